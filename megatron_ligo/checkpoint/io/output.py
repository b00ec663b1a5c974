"""The folder that a format's writer fills: tensors one at a time, each recorded in a journal once it is complete.

A writer names files and their contents; this module decides on byte layout, order, journal and fsync. A tensor that the
journal lists, and whose bytes still have the listed digest, is not written again. Several ranks can fill one folder:
rank 0 lays the files out (`FileLayoutOutput`), then each rank writes its share of the tensors.
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
    """Returns a whole (global, unpadded) stored tensor of shape `item.shape`, to compute from its canonical parts."""
    model_config = source.model_config
    return LazyTensor(
        item.shape(model_config),
        common_dtype(source, item, kind),
        lambda: item.assemble([source.read(key, kind) for key in item.keys], model_config),
    )


def common_dtype(source: Reader, item: StoredTensor, kind: str = WEIGHT) -> torch.dtype:
    """Returns the dtype of a stored tensor. Raises CheckpointError if its parts differ in dtype."""
    if kind != WEIGHT:
        return torch.float32
    dtypes = {source.info(key).dtype for key in item.keys}
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise CheckpointError(Problem(item.name, "parts of one dtype", names, "Choose one with --dtype."))
    return dtypes.pop()


class Output:
    """A folder under construction. File names are relative to it, with `/`.

    A context manager: on exit everything is on the disk, or the first error is raised.
    """

    def __init__(
        self, folder: Path, journal: Journal | None = None, workers: int = WORKERS, ranks: RankGroup = SINGLE_RANK
    ):
        self.folder = folder
        self.journal = journal or Journal()
        self.written: list[str] = []
        self._writer = ParallelWriter(self.journal, workers)
        self._rank, self._is_first = ranks.rank, ranks.rank == 0
        self._assigned_bytes = [0] * ranks.world_size
        self._created_folders: set[Path] = set()
        self._skeletons = SKELETONS if self._is_first else f"{SKELETONS}.{ranks.rank}"

    def __enter__(self) -> Output:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self._writer.finish()
            shutil.rmtree(self.folder / self._skeletons, ignore_errors=True)
        else:
            self._writer.abandon()

    def write_safetensors(
        self, name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Writes a safetensors file."""
        header, spans = lay_out_safetensors(tensors, metadata or {})
        size = len(header) + sum(span.tensor.nbytes for span in spans)
        path = self._path(name)
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.write(header)
            file.truncate(size)
        self._fill({name: spans})

    def write_torch(self, name: str, tree: object) -> None:
        """Writes what torch.save writes for a tree (dict, list, tuple) of plain data and `LazyTensor`s."""
        self.write_torch_files({name: tree})

    def write_torch_files(self, trees: Mapping[str, object]) -> None:
        """Writes several torch.save files side by side: the first tensor of each, the second of each, ..."""
        self._fill({name: self._lay_out_torch(name, tree) for name, tree in trees.items()})

    def write_torch_archives(self, name: str, trees: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        """Writes one torch.save archive for each tree into one file. Returns offset and length of each, in bytes."""
        skeleton = self._path(f"{self._skeletons}/{Path(name).name}")
        spans, archives = write_torch_archives(skeleton, trees)
        self._install(self._path(name), skeleton, spans)
        self._fill({name: spans})
        return archives

    def _lay_out_torch(self, name: str, tree: object) -> list[TensorSpan]:
        path = self._path(name)
        # An archive contains its file's name, so its skeleton has the same name.
        skeleton = self._path(f"{self._skeletons}/{path.name}")
        spans = write_torch_skeleton(skeleton, tree)
        self._install(path, skeleton, spans)
        return spans

    def _install(self, path: Path, skeleton: Path, spans: list[TensorSpan]) -> None:
        """Moves a skeleton to its path, unless a file with the same frame is there from an earlier run."""
        if path.exists() and has_same_frame(path, skeleton, spans):
            skeleton.unlink()
        else:
            skeleton.replace(path)

    def write_json(self, name: str, value: object) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        self.write_file(name, lambda path: path.write_text(text, encoding="utf-8"))

    def copy_file(self, source: Path, name: str | None = None) -> None:
        """Copies a file unchanged."""
        self.write_file(name or source.name, lambda path: shutil.copyfile(source, path))

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Calls `write` with the file's path to create a small file, which every run writes anew."""
        self.written.append(name)
        if not self._is_first:
            return
        path = self._path(name)
        write(path)
        fsync_path(path)

    def _path(self, name: str) -> Path:
        path = self.folder / name
        if path.parent not in self._created_folders:
            assert path.resolve().is_relative_to(self.folder.resolve()), f"{name} is outside of the folder"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._created_folders.add(path.parent)
        assert path.name != "..", f"{name} is outside of the folder"
        return path

    def _fill(self, files: Mapping[str, list[TensorSpan]]) -> None:
        opened = {name: self._writer.open(name, self._path(name)) for name in files}
        for row in zip_longest(*files.values()):
            for file, span in zip(opened.values(), row, strict=True):
                if span is not None:
                    self._write_span(file, span)
        for name, file in opened.items():
            self._writer.close(file)
            self.written.append(name)

    def _write_span(self, file: OpenFile, span: TensorSpan) -> None:
        nbytes = span.tensor.nbytes
        if span.tensor.make is None:
            if self._is_first:
                file.leave_zeros(span)
        elif self._is_assigned(nbytes):
            recorded = self.journal.get("wrote", file.name, span.name)
            if recorded is None or recorded != digest.hash_file_part(file.path, span.offset, nbytes):
                file.enter()
                self._writer.put(file, span)

    def _is_assigned(self, nbytes: int) -> bool:
        """Assigns the next tensor to the rank with the fewest bytes so far. All ranks compute the same assignment."""
        rank = self._assigned_bytes.index(min(self._assigned_bytes))
        self._assigned_bytes[rank] += nbytes
        return rank == self._rank


class FileLayoutOutput(Output):
    """Lays out the files of tensors for the ranks that fill them: everything but the tensors' bytes."""

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def _write_span(self, file: OpenFile, span: TensorSpan) -> None:
        pass
