"""The safetensors files of a folder as one table of tensors, mapped and read one at a time."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ligo.common import symlinks
from megatron_ligo.common.atomic_files import parse_json, read_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-*-of-*.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SafetensorsShards:
    """Open files, and the file of each tensor. errors: problems of the files themselves."""

    def __init__(self, files: Sequence[Path]):
        self.errors: list[str] = []
        self._files: dict[str, Path] = {}
        self._open = {}
        self._views: dict[str, Tensor] = {}
        for file in files:
            self._add(file)

    def _add(self, file: Path) -> None:
        if not file.is_file():
            self.errors.append(Problem(str(file), "a whole safetensors file", "no file"))
            return
        try:
            opened = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            self.errors.append(Problem(str(file), "a whole safetensors file", f"{error}", "Download it again."))
            return
        self._open[file] = opened
        for name in _duplicate_names(file):
            self.errors.append(Problem(f"{name} ({file.name})", "one tensor of that name", "two"))
        for name in opened.keys():  # noqa: SIM118 - no dict
            if name in self._files:
                both = f"{self._files[name].name} and {file.name}"
                self.errors.append(Problem(name, "one tensor of that name", f"two, in {both}"))
            self._files[name] = file

    def names(self) -> set[str]:
        return set(self._files)

    def file(self, name: str) -> Path:
        return self._files[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._open[self._files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Returns a tensor's dtype; None for integers, booleans and 8-bit types, which are not weights."""
        return DTYPES.get(self._stored_dtype(name))

    def _stored_dtype(self, name: str) -> str:
        return self._open[self._files[name]].get_slice(name).get_dtype()

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor in its stored shape and dtype, as a view of the mapped file."""
        # Depth maps read a layer's tensors once per large layer; creating new views took a tenth of the time.
        if name not in self._views:
            self._views[name] = self._open[self._files[name]].get_tensor(name)
        return self._views[name]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and tensor of each floating-point tensor, in its stored shape."""
        return ((name, self.tensor(name)) for name in sorted(self._files) if self.dtype(name) is not None)

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Sequence[str], errors: ErrorCollector) -> None:
        """Adds an error for each missing or unexpected tensor, and each one of a wrong shape or dtype."""
        for name, shape in expected.items():
            if name not in self._files:
                errors.add(name, f"a tensor of shape {shape}", "nothing")
                continue
            where = f"{name} ({self._files[name].name})"
            if self.shape(name) != shape:
                errors.add(where, f"shape {shape}", self.shape(name))
            if self.dtype(name) is None:
                errors.add(where, f"one of {', '.join(DTYPES)}", self._stored_dtype(name))
        for name in sorted(self.names() - set(expected)):
            if not any(fnmatchcase(name, pattern) for pattern in ignored):
                errors.add(f"{name} ({self._files[name].name})", "no such tensor", "one")

    def close(self) -> None:
        self._open.clear()
        self._views.clear()


def _duplicate_names(file: Path) -> list[str]:
    """Returns names that occur twice in a valid header: the library silently takes the last."""
    duplicates = []

    def collect(pairs: list[tuple[str, object]]) -> dict:
        table = dict(pairs)
        if len(table) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            duplicates.extend(sorted(name for name, count in counts.items() if count > 1))
        return table

    with file.open("rb") as opened:
        (size,) = struct.unpack("<Q", opened.read(8))
        parse_json(opened.read(size), collect)
    return duplicates


def open_shards(folder: Path) -> SafetensorsShards:
    """Opens the files of a folder's weights. Raises CheckpointError if there are none, or more than one set."""
    single, index = folder / SINGLE, folder / INDEX
    shards = {file.name for file in folder.glob(SHARD)}
    if single.exists() and (index.exists() or shards):
        both = ", ".join(sorted({SINGLE, *shards, *([INDEX] if index.exists() else [])}))
        raise CheckpointError(Problem(f"{folder}", f"either {SINGLE} or shards with an index", both, "Remove one."))
    if single.exists():
        _check_inside(folder, SINGLE)
        return SafetensorsShards([single])
    if not index.exists():
        raise CheckpointError(Problem(f"{folder}", f"{SINGLE} or {INDEX}", ", ".join(sorted(shards)) or "neither"))
    return _open_indexed(folder, _weight_map(index), shards)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{index}", "an index with a weight_map", f"{error!r}")) from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(Problem(f"{index}: weight_map", "file names by tensor name", "other values"))
    return weight_map


def _open_indexed(folder: Path, weight_map: Mapping[str, str], present: set[str]) -> SafetensorsShards:
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(folder, name)
    missing = [name for name in names if not (folder / name).is_file()]
    shards = SafetensorsShards([folder / name for name in names if name not in missing])
    for name in missing:
        shards.errors.append(Problem(f"{name}", f"a file, which {INDEX} lists", "nothing"))
    for name in sorted(present - set(names)):
        shards.errors.append(Problem(f"{name}", f"only shards that {INDEX} lists", "another one"))
    for name, file in weight_map.items():
        if name in shards.names() and shards.file(name).name != file:
            shards.errors.append(Problem(name, f"a tensor in {file}, which {INDEX} lists", shards.file(name).name))
    return shards


def _check_inside(folder: Path, name: str) -> None:
    """Raises CheckpointError for a file outside of the folder and of a Hugging Face cache's blobs."""
    plain = name not in ("", ".", "..") and Path(name).name == name and "\0" not in name
    if not plain or (folder / name).resolve().parent not in symlinks.allowed_roots(folder):
        hint = "The link leads out of the folder and is not followed."
        raise CheckpointError(Problem(f"{folder}: {name!r}", "a file of this folder", "another place", hint))
