"""The weight files of a folder as one table of tensors, mapped and read one at a time; or a state dict in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.checkpoint.formats.hf.tensor_files import DTYPES, StateDict, TensorFile, open_tensor_file
from megatron_ligo.checkpoint.io import tensor_check
from megatron_ligo.common import symlinks
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem


@dataclass(frozen=True)
class WeightFiles:
    """The names of a folder's weight files: a single one, or shards with an index."""

    single: str
    index: str
    shards: str

    def are_in(self, folder: Path) -> bool:
        return self.are_complete_in(folder) or any(folder.glob(self.shards))

    def are_complete_in(self, folder: Path) -> bool:
        return (folder / self.single).exists() or (folder / self.index).exists()


# Longest file name of common file systems.
MAX_NAME_LENGTH = 255
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SAFETENSORS_FILES = WeightFiles(SINGLE, INDEX, "model-*-of-*.safetensors")
TORCH_FILES = WeightFiles("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin")
# Of Accelerate with FSDP, where the whole state dict is saved: never in shards.
FSDP_FILES = WeightFiles("pytorch_model_fsdp.bin", "pytorch_model_fsdp.bin.index.json", "pytorch_model_fsdp-*-of-*.bin")
# The first kind in a folder is read.
FILE_KINDS = (SAFETENSORS_FILES, TORCH_FILES, FSDP_FILES)
# Of the Trainer and of Accelerate: the optimizer's files or folder, and the folder of a sharded model.
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "optimizer_0")
ACCELERATE_FOLDER = "pytorch_model_fsdp_0"
# Of the peft library.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class WeightShards:
    """Open files, and the file of each tensor. errors: problems of the files themselves."""

    def __init__(self, files: Sequence[Path]):
        self.errors: list[str] = []
        # Name -> path, open file, and the name in the file.
        self._places: dict[str, tuple[Path, TensorFile, str]] = {}
        self._files: list[TensorFile] = []
        self._views: dict[str, Tensor] = {}
        for path in files:
            try:
                self.add(path, open_tensor_file(path))
            except CheckpointError as error:
                self.errors += error.problems

    def add(self, path: Path, file: TensorFile) -> None:
        """Adds the tensors of a file, which errors name by its path."""
        self._files.append(file)
        for name in file.names():
            if name in self._places:
                both = f"{self._places[name][0].name} and {path.name}"
                self.errors.append(Problem(name, "one tensor of that name", f"two, in {both}"))
            self._places[name] = (path, file, name)

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Replaces the tensors' names by other ones, each its own."""
        self._places = {renamed(name): place for name, place in self._places.items()}

    def split(self, name: str, open_parts: Callable[[TensorFile, str], TensorFile]) -> None:
        """Replaces a tensor by its parts. open_parts: returns a table of them from its file and its name there."""
        path, file, stored_name = self._places.pop(name)
        self.add(path, open_parts(file, stored_name))

    def names(self) -> set[str]:
        return set(self._places)

    def file(self, name: str) -> Path:
        return self._places[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        _, file, stored_name = self._places[name]
        return file.shape(stored_name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Returns a tensor's dtype; None for integers, booleans and 8-bit types, which are not weights."""
        _, file, stored_name = self._places[name]
        return file.dtype(stored_name)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor in its stored shape and dtype, as a view of the mapped file."""
        # Depth maps read a layer's tensors once per large layer; creating new views took a tenth of the time.
        if name not in self._views:
            _, file, stored_name = self._places[name]
            self._views[name] = file.tensor(stored_name)
        return self._views[name]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and tensor of each floating-point tensor, in its stored shape."""
        return ((name, self.tensor(name)) for name in sorted(self._places) if self.dtype(name) is not None)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str], errors: ErrorCollector) -> None:
        """Adds an error for each missing or unexpected tensor, and each one of a wrong shape or dtype."""
        for name, shape in expected.items():
            if name not in self._places:
                errors.add(name, f"a tensor of shape {shape}", "nothing")
                continue
            where = f"{name} ({self.file(name).name})"
            if self.shape(name) != shape:
                errors.add(where, f"shape {shape}", self.shape(name))
            if self.dtype(name) is None:
                _, file, stored_name = self._places[name]
                errors.add(where, f"one of {', '.join(DTYPES)}", file.dtype_name(stored_name))
        for name in sorted(self.names() - set(expected)):
            if not any(fnmatchcase(name, pattern) for pattern in ignored):
                errors.add(f"{name} ({self.file(name).name})", "no such tensor", "one")

    def check_own_bytes(self, expected: Iterable[str], tied: Sequence[Collection[str]], errors: ErrorCollector) -> None:
        """Adds an error for two expected tensors of a state dict that share numbers without being tied."""
        expected = set(expected)
        for file in self._files:
            if isinstance(file, StateDict):
                stored = file.stored_tensors()
                places = ((name, place) for name, place in self._places.items() if name in expected)
                own = {name: stored[stored_name] for name, (_, owner, stored_name) in places if owner is file}
                tensor_check.check_own_bytes(own, tied, errors)

    def close(self) -> None:
        self._files.clear()
        self._places.clear()
        self._views.clear()


def open_state_dict(state: Mapping[str, object], where: str) -> WeightShards:
    """Opens a state dict in memory. Raises CheckpointError for values that are not whole tensors."""
    shards = WeightShards([])
    shards.add(Path(where), StateDict(state, where))
    return shards


def describe_unread(folder: Path) -> tuple[str, ...]:
    """Returns what a folder holds that is not read: weights that a preferred kind has too, a Trainer's Adam."""
    read, *others = (kind.single for kind in FILE_KINDS if kind.are_in(folder))
    unread = [f"{single} or its shards ({read} or its shards beside it are read)" for single in others]
    if (folder / ACCELERATE_FOLDER).is_dir():
        unread.append(f"{ACCELERATE_FOLDER} (sharded weights; the files beside it are read)")
    return (*unread, *describe_optimizer(folder))


def describe_optimizer(folder: Path) -> tuple[str, ...]:
    """Returns the optimizer state of a Trainer's or Accelerate's folder, which is not read."""
    names = [name for name in OPTIMIZER_FILES if (folder / name).exists()]
    return (f"optimizer state ({', '.join(names)}: in the trainer's own form)",) if names else ()


def _check_no_adapter(folder: Path) -> None:
    """Raises CheckpointError for a low-rank adapter beside the weights: transformers adds it to them, or another
    model's weights instead."""
    adapters = [name for name in ADAPTER_FILES if (folder / name).exists()]
    if adapters:
        hint = "Merge it into the weights and save them alone, or move it away if they are merged."
        raise CheckpointError(Problem(f"{folder}", "weights without an adapter", ", ".join(adapters), hint))


def open_shards(folder: Path) -> WeightShards:
    """Opens the files of a folder's weights. Raises CheckpointError if there are none, or more than one set."""
    _check_no_adapter(folder)
    kind = next((kind for kind in FILE_KINDS if kind.are_in(folder)), SAFETENSORS_FILES)
    single, index = folder / kind.single, folder / kind.index
    shards = {file.name for file in folder.glob(kind.shards)}
    if single.exists() and (index.exists() or shards):
        both = ", ".join(sorted({kind.single, *shards, *([kind.index] if index.exists() else [])}))
        expected = f"either {kind.single} or shards with an index"
        raise CheckpointError(Problem(f"{folder}", expected, both, "Remove one."))
    if single.exists():
        _check_inside(folder, kind.single)
        return WeightShards([single])
    if not index.exists():
        raise CheckpointError(Problem(f"{folder}", f"{SINGLE} or {kind.index}", ", ".join(sorted(shards)) or "neither"))
    return _open_indexed(folder, index, shards)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{index}", "an index with a weight_map", f"{error!r}")) from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(Problem(f"{index}: weight_map", "file names by tensor name", "other values"))
    return weight_map


def _open_indexed(folder: Path, index: Path, present: set[str]) -> WeightShards:
    weight_map = _weight_map(index)
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(folder, name)
    missing = [name for name in names if not (folder / name).is_file()]
    shards = WeightShards([folder / name for name in names if name not in missing])
    for name in missing:
        shards.errors.append(Problem(f"{name}", f"a file, which {index.name} lists", "nothing"))
    for name in sorted(present - set(names)):
        shards.errors.append(Problem(f"{name}", f"only shards that {index.name} lists", "another one"))
    stored_names = shards.names()
    for name, file in weight_map.items():
        if name in stored_names and shards.file(name).name != file:
            shards.errors.append(Problem(name, f"a tensor in {file}, which {index.name} lists", shards.file(name).name))
    return shards


def _check_inside(folder: Path, name: str) -> None:
    """Raises CheckpointError for a file outside of the folder and of a Hugging Face cache's blobs."""
    plain = name not in ("", ".", "..") and name.isprintable() and len(name.encode()) <= MAX_NAME_LENGTH
    plain = plain and Path(name).name == name
    try:
        is_inside = plain and (folder / name).resolve().parent in symlinks.allowed_roots(folder)
    except (OSError, RuntimeError):
        # A name that is too long, or a link to itself.
        is_inside = False
    if not is_inside:
        hint = "The link leads out of the folder and is not followed."
        raise CheckpointError(Problem(f"{folder}: {name[:200]!r}", "a file of this folder", "another place", hint))
