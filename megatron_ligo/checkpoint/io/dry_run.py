"""A writer's dry run: counts the bytes of its files and raises what the writer refuses, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from megatron_ligo.checkpoint.io.file_layout import LazyTensor, TensorSpan
from megatron_ligo.checkpoint.io.output import Output


class DryRunOutput(Output):
    """Counts the bytes of tensors (not of zeros, which stay holes) and of copied files. Computes no tensor.

    folder: for scratch files.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.bytes = 0

    def write_safetensors(
        self, name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._count(tensors.values())

    def write_torch_files(self, trees: Mapping[str, object]) -> None:
        for tree in trees.values():
            self._count({id(tensor): tensor for tensor in _walk_tensors(tree)}.values())

    def write_torch_archives(self, name: str, trees: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        self.write_torch_files(trees)
        return dict.fromkeys(trees, (0, 0))

    def copy_file(self, source: Path, name: str | None = None) -> None:
        self.bytes += source.stat().st_size

    def write_file(self, name: str, write: Callable[[Path], object]) -> None:
        pass

    def _fill(self, files: Mapping[str, list[TensorSpan]]) -> None:
        self._count(span.tensor for spans in files.values() for span in spans)

    def _count(self, tensors: Iterable[LazyTensor]) -> None:
        self.bytes += sum(tensor.nbytes for tensor in tensors if tensor.make is not None)


def _walk_tensors(tree: object) -> Iterator[LazyTensor]:
    if isinstance(tree, LazyTensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _walk_tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _walk_tensors(value)
