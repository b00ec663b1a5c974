"""A folder of torch.distributed.checkpoint: its tensors by name, read from their chunks, and how one is written.

    DIR/.metadata         every tensor and its chunks (megatron_core/dcp_metadata.py)
    DIR/__0_0.distcp      archives of torch.save, one per chunk

It states no sizes: config.json must lie in the folder or beside it.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Role, layer_index
from megatron_ligo.checkpoint.formats.hf.config_json import CONFIG
from megatron_ligo.checkpoint.formats.hf.shards import ACCELERATE_FOLDER
from megatron_ligo.checkpoint.formats.hf.tensor_files import DTYPES, TensorFile
from megatron_ligo.checkpoint.formats.megatron_core import backend, dcp_metadata
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import (
    METADATA_FILE,
    ChunkedTensor,
    FileSpan,
    TensorChunk,
)
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.io.output import Output, lazy_tensor
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding import fused_tensors

# Beginnings of the names of a training's state that is not the model's.
STATE_PREFIXES = ("optim.", "optimizer.", "optimizers.", "lr_scheduler.", "train_state.", "dataloader.")
TITAN_MARK, MODERNBERT_MARK = b"tok_embeddings.weight", b"embeddings.tok_embeddings.weight"


def find_folder(path: Path) -> Path | None:
    """Returns the folder with the metadata at a path; None if there is none, or if it is Megatron-core's."""
    for folder in (path, path / ACCELERATE_FOLDER):
        if (folder / METADATA_FILE).is_file():
            return None if backend.is_distributed(folder) else folder
    return None


def is_torchtitan(folder: Path) -> bool:
    metadata = (folder / METADATA_FILE).read_bytes()
    return TITAN_MARK in metadata and MODERNBERT_MARK not in metadata


def find_config(folder: Path) -> Path:
    """Returns the config.json of a folder. Raises CheckpointError if none lies in it or beside it."""
    for root in (folder, folder.parent):
        if (root / CONFIG).is_file():
            return root / CONFIG
    hint = "Copy the model's config.json there: torch.distributed.checkpoint stores no sizes."
    raise CheckpointError(Problem(f"{folder}", f"{CONFIG}, in the folder or beside it", "none", hint))


class DcpTensors(TensorFile):
    """The model's tensors of a folder. `state`: the names of the others, such as an optimizer's."""

    def __init__(self, folder: Path):
        self.folder = folder
        contents = dcp_metadata.read_metadata(folder)
        self.state = sorted(name for name in contents.tensors if name.startswith(STATE_PREFIXES))
        self._tensors: dict[str, ChunkedTensor] = {
            name: tensor for name, tensor in contents.tensors.items() if not name.startswith(STATE_PREFIXES)
        }
        self._checked: set[TensorChunk] = set()

    def describe_unread(self) -> tuple[str, ...]:
        """Returns what is not read, for the log and the manifest."""
        return (f"the training's state ({self.state[0]} and {len(self.state) - 1} more)",) if self.state else ()

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype_name(self, name: str) -> str:
        return f"{self._tensors[name].dtype}"

    def dtype(self, name: str) -> torch.dtype | None:
        dtype = self._tensors[name].dtype
        return dtype if dtype in DTYPES.values() else None

    def tensor(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        if len(tensor.chunks) == 1:
            return self._map(tensor, tensor.chunks[0])
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for chunk in tensor.chunks:
            target = whole
            for dim, (start, size) in enumerate(zip(chunk.offset, chunk.shape, strict=True)):
                target = target.narrow(dim, start, size)
            target.copy_(self._map(tensor, chunk))
        return whole

    def _map(self, tensor: ChunkedTensor, chunk: TensorChunk) -> Tensor:
        path = self.folder / chunk.file
        is_first = chunk not in self._checked
        block = torch_files.map_tensor(path, chunk.file_offset, chunk.file_length, check_bytes=is_first)
        self._checked.add(chunk)
        if (tuple(block.shape), block.dtype) != (chunk.shape, tensor.dtype):
            found = f"{block.dtype} {tuple(block.shape)}"
            raise CheckpointError(Problem(f"{path} at {chunk.file_offset}", f"{tensor.dtype} {chunk.shape}", found))
        return block


def tied_names(source: Reader, format_name: str) -> dict[str, str]:
    """Returns the name of a tied model's embedding and that of the head which repeats it."""
    head = source.arch.find(Role.HEAD)
    if not source.model_config.tied or head is None:
        return {}
    return {source.arch.stored_name(head.tied_to, source.model_config, format_name): head.locations[format_name].name}


def write_folder(source: Reader, output: Output, format_name: str, prefix: str = "") -> None:
    """Writes one file of whole tensors for each layer, under their names in a format, and the metadata.

    A tied head is written too: models have a name for it, which their loader looks for.
    """
    items = fused_tensors.stored_tensors(source.arch, source.model_config, format_name)
    tied, tensors = tied_names(source, format_name), {}
    for number, (_, group) in enumerate(groupby(items.values(), lambda item: layer_index(item.keys[0]))):
        named = {name: item for item in group for name in (item.name, tied.get(item.name)) if name}
        lazy = {f"{prefix}{name}": lazy_tensor(source, item) for name, item in named.items()}
        file = f"__0_{number}.distcp"
        spans = output.write_torch_archives(file, lazy)
        for name, tensor in lazy.items():
            chunk = TensorChunk((0,) * len(tensor.shape), tensor.shape, *FileSpan(file, *spans[name]))
            tensors[name] = ChunkedTensor(tensor.shape, tensor.dtype, (chunk,))
    metadata = dcp_metadata.pickle_metadata(tensors, {})
    output.write_file(METADATA_FILE, lambda path: path.write_bytes(metadata))
