"""A writer's run without writing: how many bytes its files will take. Also the first to say what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from megatron_ligo.checkpoint.io.file_layout import LazyTensor, TensorSpan
from megatron_ligo.checkpoint.io.output import Output


class DryRunOutput(Output):
    """Counts tensors (zeros that stay holes are none) and copied files. Makes no tensor; `folder` is for scratch."""

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
        self._count(place.later for places in files.values() for place in places)

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
