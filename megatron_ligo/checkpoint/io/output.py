"""Where a format's writer puts its files: tensors one at a time, each noted in a journal when it is whole.

A writer says what a file holds; the bytes, their order on the disk, the journal and fsync are decided here. What the
journal knows to be whole (and whose bytes are still the same) is not written again. Several processes can fill one
folder: the first lays the files out (`FileLayoutOutput`), then each makes and writes its share of the tensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path

import torch

from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.io.file_layout import (
    LazyTensor,
    TensorSpan,
    has_same_frame,
    lay_out_safetensors,
    write_torch_archives,
    write_torch_skeleton,
)
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.parallel_writer import WORKERS, OpenFile, ParallelWriter
from megatron_ligo.checkpoint.reader import WEIGHT, Reader
from megatron_ligo.common.atomic_files import fsync_path
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.sharding.fused_tensors import StoredTensor

SKELETONS = ".skeletons"


def lazy_tensor(source: Reader, item: StoredTensor, kind: str = WEIGHT) -> LazyTensor:
    """A whole (global, unpadded) stored tensor, to be made from its canonical parts."""
    model_config = source.model_config
    return LazyTensor(
        item.shape(model_config),
        common_dtype(source, item, kind),
        lambda: item.assemble([source.read(key, kind) for key in item.keys], model_config),
    )


def common_dtype(source: Reader, item: StoredTensor, kind: str = WEIGHT) -> torch.dtype:
    """The dtype of a stored tensor: that of its parts, which must be one."""
    if kind != WEIGHT:
        return torch.float32
    found = {source.info(key).dtype for key in item.keys}
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise CheckpointError(Problem(item.name, "parts of one dtype", names, "Choose one with --dtype."))
    return found.pop()


class Output:
    """A folder under construction. Names of files are relative to it, with `/`.

    A context manager: at its end everything is on the disk, or its error is raised.
    """

    def __init__(
        self, folder: Path, journal: Journal | None = None, workers: int = WORKERS, ranks: RankGroup = SINGLE_RANK
    ):
        self.folder = folder
        self.journal = journal or Journal()
        self.written: list[str] = []
        self._writer = ParallelWriter(workers)
        self._first = ranks.rank == 0
        self._rank, self._dealt = ranks.rank, [0] * ranks.world_size
        self._made: set[Path] = set()
        self._skeletons = SKELETONS if self._first else f"{SKELETONS}.{ranks.rank}"

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._writer.finish()
            shutil.rmtree(self.folder / self._skeletons, ignore_errors=True)
        else:
            self._writer.abandon()

    def write_safetensors(
        self, name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """A safetensors file."""
        header, places = lay_out_safetensors(tensors, metadata or {})
        size = len(header) + sum(place.later.nbytes for place in places)
        path = self._path(name)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.write(header)
            file.truncate(size)
        self._fill({name: places})

    def write_torch(self, name: str, tree: object) -> None:
        """What torch.save writes for a tree (dict, list, tuple) of plain data with `LazyTensor` for its tensors."""
        self.write_torch_files({name: tree})

    def write_torch_files(self, trees: Mapping[str, object]) -> None:
        """Several such files, filled side by side: the first tensor of each, the second of each, ..."""
        self._fill({name: self._laid_out(name, tree) for name, tree in trees.items()})

    def write_torch_archives(self, name: str, trees: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        """What torch.save writes for each tree, one after the other in one file. Offset and length of each, by name."""
        aside = self._path(f"{self._skeletons}/{Path(name).name}")
        places, spans = write_torch_archives(aside, trees)
        self._place(self._path(name), aside, places)
        self._fill({name: places})
        return spans

    def _laid_out(self, name: str, tree: object) -> list[TensorSpan]:
        path = self._path(name)
        # The archive bears the file's name inside, so the skeleton has the same one.
        aside = self._path(f"{self._skeletons}/{path.name}")
        places = write_torch_skeleton(aside, tree)
        self._place(path, aside, places)
        return places

    def _place(self, path: Path, aside: Path, places: list[TensorSpan]) -> None:
        """Puts a skeleton into its place, unless one with the same frame stands there."""
        if path.exists() and has_same_frame(path, aside, places):
            aside.unlink()
        else:
            aside.replace(path)

    def write_json(self, name: str, value: object) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """A file carried along."""
        self.write_file(name or source.name, lambda path: shutil.copyfile(source, path))

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """A file that `write` makes at the path it is given (always anew: for what is small)."""
        self.written.append(name)
        if not self._first:
            return
        path = self._path(name)
        write(path)
        fsync_path(path)

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if path.parent not in self._made:
            assert path.resolve().is_relative_to(self.folder.resolve()), f"{name} is outside of the folder"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        assert path.name != "..", f"{name} is outside of the folder"
        return path

    def _fill(self, files: Mapping[str, list[TensorSpan]]) -> None:
        opened = {name: OpenFile(self._path(name)) for name in files}
        for row in zip_longest(*files.values()):
            for name, place in zip(files, row, strict=True):
                if place is not None:
                    self._put(name, opened[name], place)
        for name, file in opened.items():
            self._writer.close(file)
            self.written.append(name)

    def _put(self, name: str, file: OpenFile, place: TensorSpan) -> None:
        if place.later.make is None:
            if self._first:
                file.leave_zeros(place)
            return
        if not self._mine(place.later.nbytes):
            return
        known = self.journal.get("wrote", name, place.name)
        if known is None or known != digest.hash_file_part(self._path(name), place.offset, place.later.nbytes):
            file.enter()
            self._writer.put(file, place, self._noting(name, place.name))

    def _mine(self, nbytes: int) -> bool:
        """Each tensor goes to the process that has had the fewest bytes: all of them count alike."""
        taker = self._dealt.index(min(self._dealt))
        self._dealt[taker] += nbytes
        return taker == self._rank

    def _noting(self, name: str, part: str) -> Callable[[str], None]:
        return lambda found: self.journal.add("wrote", name, part, value=found)


class FileLayoutOutput(Output):
    """Lays the files of tensors out for those who fill them: all but the tensors."""

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def _put(self, name: str, file: OpenFile, place: TensorSpan) -> None:
        pass
