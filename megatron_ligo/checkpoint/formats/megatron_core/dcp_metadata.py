"""The `.metadata` file of torch.distributed.checkpoint: each tensor's shape, dtype and chunks, and their place on disk.

The file is a plain pickle. The unpickler here knows only the classes that such a file needs, and replaces them by
stubs that execute nothing.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_ligo.arch.mcore_names import to_fused_name
from megatron_ligo.checkpoint.io.pickles import pickle_enums, pickle_limits
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

METADATA_FILE = ".metadata"
VERSION = "1.0.0"
MAX_SIZE = 1 << 62


class PickleStub:
    """Stands in for a pickled class: keeps the constructor's arguments and the state."""

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


def _make_stub(name: str) -> type[PickleStub]:
    return type(name, (PickleStub,), {})


_CHECKPOINT = "torch.distributed.checkpoint"
_STUB_NAMES = {
    f"{_CHECKPOINT}.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # The save plan of each rank, which Megatron-core caches for its next save.
    f"{_CHECKPOINT}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    # Where torch.distributed.checkpoint.save has written it.
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}  # fmt: skip
_ALLOWED_GLOBALS: dict[tuple[str, str], object] = {
    (module, name): _make_stub(name) for module, names in _STUB_NAMES.items() for name in names
}
_ALLOWED_GLOBALS[pickle_enums.GETATTR] = pickle_enums.enum_stand_ins(list(_ALLOWED_GLOBALS.values()))
_ALLOWED_GLOBALS["torch", "Size"] = tuple
_ALLOWED_GLOBALS["torch.serialization", "_get_layout"] = _make_stub("Layout")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if type(dtype) is torch.dtype}
# Exceptions that unpickling raises for damaged bytes.
_DAMAGE = (
    pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError,
    OverflowError, RecursionError, ImportError, AssertionError, struct.error,
)  # fmt: skip


class _RefusedGlobal(Exception):
    pass


# The C unpickler allocates its memo up front, at whatever size a few bytes of the pickle claim.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _ALLOWED_GLOBALS:
            raise _RefusedGlobal(f"{module}.{name}")
        return _ALLOWED_GLOBALS[module, name]


class FileSpan(NamedTuple):
    """A byte range of a file, which holds one archive of torch.save."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class TensorChunk:
    """A block of a tensor: its offset and shape in the tensor, and the byte range of its archive."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    file_offset: int
    file_length: int


@dataclass(frozen=True)
class ChunkedTensor:
    """A tensor's global shape, and the chunks that tile it without gaps, sorted by offset."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[TensorChunk, ...]


@dataclass(frozen=True)
class DcpContents:
    """Contents of a checkpoint folder by name: tensors, and objects that torch.save wrote."""

    tensors: Mapping[str, ChunkedTensor]
    objects: Mapping[str, FileSpan]


def read_metadata(folder: Path) -> DcpContents:
    """Reads the metadata and checks it against the files. Raises CheckpointError with all errors."""
    path = folder / METADATA_FILE
    metadata = _unpickle(path)
    try:
        entries, storage = metadata.state["state_dict_metadata"], metadata.state["storage_data"]
        spans = {_parse_index(index): _parse_span(info) for index, info in storage.items()}
        errors = ErrorCollector(f"{path} does not describe tensors in files next to it", CheckpointError)
        _check_files(folder, spans, errors)
        tensors, objects = {}, {}
        for name, entry in entries.items():
            kind = type(entry).__name__
            if type(name) is not str or kind not in ("TensorStorageMetadata", "BytesStorageMetadata"):
                raise ValueError(f"{name!r} is a {kind}")
            if kind == "BytesStorageMetadata":
                if (name, None) in spans:
                    objects[name] = spans[name, None]
                else:
                    errors.add(name, "a byte range in a file", "none")
                continue
            tensor = _parse_tensor(name, entry, spans, errors)
            if tensor:
                tensors[name] = tensor
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(Problem(f"{path}", "the metadata of a distributed checkpoint", found)) from None
    errors.raise_if_any()
    return DcpContents(tensors, objects)


def pickle_metadata(tensors: Mapping[str, ChunkedTensor], objects: Mapping[str, FileSpan]) -> bytes:
    """Returns the bytes of a `.metadata` file with torch's own classes."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries, storage = {}, {}
    for name, tensor in tensors.items():
        blocks = [
            dcp.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in tensor.chunks
        ]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        entries[name] = dcp.TensorStorageMetadata(properties, torch.Size(tensor.shape), blocks)
        for chunk in tensor.chunks:
            storage_info = _StorageInfo(chunk.file, chunk.file_offset, chunk.file_length)
            storage[dcp.MetadataIndex(name, chunk.offset)] = storage_info
    for name, span in objects.items():
        entries[name] = dcp.BytesStorageMetadata()
        storage[dcp.MetadataIndex(name)] = _StorageInfo(*span)
    metadata = dcp.Metadata(entries, storage_data=storage)
    if hasattr(metadata, "version"):
        # torch 2.8 has no such field.
        metadata.version = VERSION
    return pickle.dumps(metadata)


def _unpickle(path: Path) -> PickleStub:
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(Problem(f"{path}", "a file", "nothing there")) from None
    except _RefusedGlobal as error:
        hint = "The file is not loaded, as loading it could run code."
        raise CheckpointError(Problem(f"{path}", "classes of torch.distributed.checkpoint", f"{error}", hint)) from None
    except _DAMAGE as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(Problem(f"{path}", "a complete pickle", found, "Fetch it again.")) from None
    pickle_limits.check_tree(f"{path}", metadata)
    if type(metadata).__name__ != "Metadata":
        raise CheckpointError(Problem(f"{path}", "torch's Metadata", type(metadata).__name__))
    return metadata


def _parse_index(index: PickleStub) -> tuple[str, tuple[int, ...] | None]:
    """Returns the name and the chunk's offset (None for an object)."""
    offset = index.state.get("offset")
    return index.state["fqn"], None if offset is None else _parse_sizes(offset)


def _parse_span(info: PickleStub) -> FileSpan:
    file, offset, length = (info.state[name] for name in ("relative_path", "offset", "length"))
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{file}: its bytes are transformed by {info.state['transform_descriptors']}")
    if type(file) is not str or Path(file).name != file or file in (".", ".."):
        raise ValueError(f"{file!r} is not the name of a file in the folder")
    return FileSpan(file, *_parse_sizes((offset, length)))


def _parse_sizes(sizes: object) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list) or not all(type(size) is int and 0 <= size < MAX_SIZE for size in sizes):
        raise ValueError(f"{sizes!r} are not sizes")
    return tuple(sizes)


def _check_files(folder: Path, spans: Mapping[tuple, FileSpan], errors: ErrorCollector) -> None:
    """Checks that every file exists and covers its byte ranges, that no two share bytes, and no file is unused."""
    ends: dict[str, int] = {}
    previous = FileSpan("", 0, 0), ""
    tensors = [(span, name) for (name, offset), span in spans.items() if offset is not None]
    # Objects may be one: a writer stores the layers' empty states once.
    objects = {span: name for (name, offset), span in spans.items() if offset is None}
    for span, name in sorted([*tensors, *objects.items()], key=lambda entry: (entry[0], len(entry[1]))):
        # A weight in fp32 may be its own master weight, whose name ends with the weight's; a norm may have two names.
        names = (f".{to_fused_name(other)}" for other in (name, previous[1]))
        is_same = span == previous[0] and str.endswith(*names)
        if span.offset < ends.get(span.file, 0) and not is_same:
            errors.add(name, f"bytes of its own in {span.file}", f"some of those of {previous[1]}")
        if span.offset + span.length > ends.get(span.file, -1):
            ends[span.file], previous = span.offset + span.length, (span, name)
    for file, end in sorted(ends.items()):
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            errors.add(file, "a file", "nothing there", "Fetch it again.")
        elif size < end:
            errors.add(file, f"at least {end} bytes", size, "The file is truncated. Fetch it again.")
    for path in sorted(folder.glob("*.distcp")):
        if path.name not in ends:
            errors.add(path.name, "only files that the metadata names", "another", "Is it another checkpoint's?")


def _parse_tensor(name: str, entry: PickleStub, spans: Mapping, errors: ErrorCollector) -> ChunkedTensor | None:
    shape, dtype = _parse_sizes(entry.state["size"]), entry.state["properties"].state[0]
    if type(dtype) is not torch.dtype:
        raise ValueError(f"{name}: {dtype!r} is not a dtype")
    blocks = [
        (_parse_sizes(chunk.state["offsets"]), _parse_sizes(chunk.state["sizes"])) for chunk in entry.state["chunks"]
    ]
    missing = [offset for offset, _ in blocks if (name, offset) not in spans]
    if missing:
        errors.add(name, f"{len(blocks)} chunks in its files", f"{len(missing)} chunks without a file")
        return None
    if not _is_grid(shape, blocks):
        errors.add(name, f"chunks that tile {shape}", f"{len(blocks)} that overlap, leave gaps or reach beyond it")
        return None
    chunks = [TensorChunk(offset, size, *spans[name, offset]) for offset, size in sorted(blocks)]
    return ChunkedTensor(shape, dtype, tuple(chunks))


def _is_grid(shape: tuple[int, ...], blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Returns whether blocks (offset, size) are the cells of a grid over a shape, each exactly once."""
    if any(len(offset) != len(shape) or len(size) != len(shape) for offset, size in blocks):
        return False
    cells, num_cells = dict(blocks), 1
    widths = []  # by dim: start of a cell -> its size
    for dim, size in enumerate(shape):
        edges = [*sorted({offset[dim] for offset in cells}), size]
        if edges[0] != 0:
            return False
        widths.append({start: stop - start for start, stop in pairwise(edges)})
        num_cells *= len(widths[-1])
    sizes_match = all(
        tuple(size) == tuple(width[start] for width, start in zip(widths, offset, strict=True))
        for offset, size in cells.items()
    )
    return sizes_match and num_cells == len(cells) == len(blocks)
