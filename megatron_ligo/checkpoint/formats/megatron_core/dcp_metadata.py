"""The `.metadata` of torch.distributed.checkpoint: which tensors there are, and where in which file each chunk lies.

It is a plain pickle. Only the names that such a file needs are known here, and what they stand for does nothing.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from megatron_ligo.checkpoint.io import pickle_enums, pickle_limits
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

METADATA = ".metadata"
VERSION = "1.0.0"


class PickleStub:
    """Stands in for whatever is named: keeps what it is given."""

    def __init__(self, *arguments: object):
        self.arguments = arguments
        self.state: object = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


def _inert(name: str) -> type[PickleStub]:
    return type(name, (PickleStub,), {})


_CHECKPOINT = "torch.distributed.checkpoint"
_NAMES = {
    f"{_CHECKPOINT}.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    # What each rank had planned to write, which Megatron-core keeps to compare its next plan with.
    f"{_CHECKPOINT}.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
}  # fmt: skip
_KNOWN: dict[tuple[str, str], object] = {
    (module, name): _inert(name) for module, names in _NAMES.items() for name in names
}
_KNOWN[pickle_enums.GETATTR] = pickle_enums.enum_stand_ins(list(_KNOWN.values()))
_KNOWN["torch", "Size"] = tuple
_KNOWN["torch.serialization", "_get_layout"] = _inert("Layout")
_DTYPES = {str(found).removeprefix("torch."): found for found in vars(torch).values() if type(found) is torch.dtype}
# What unpickling raises for bytes that are no such pickle.
_DAMAGE = (
    pickle.UnpicklingError, OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, MemoryError,
    OverflowError, RecursionError, ImportError, AssertionError, struct.error,
)  # fmt: skip


class _Refused(Exception):
    pass


# The one in C makes room at once for as many objects as a pickle of a few bytes says that it will number.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _KNOWN:
            raise _Refused(f"{module}.{name}")
        return _KNOWN[module, name]


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and where its archive lies."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Entry:
    """One tensor: global shape, and the chunks that tile it without a gap, in order of their offsets."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Contents:
    """What a folder holds: tensors, and what are none (file, offset and length of what torch.save wrote)."""

    tensors: Mapping[str, Entry]
    objects: Mapping[str, tuple[str, int, int]]


def load(folder: Path) -> Contents:
    """Reads and checks the metadata; every file is there and as long as it must be. CheckpointError with all faults."""
    path = folder / METADATA
    data = _unpickled(path)
    try:
        described, places = data.state["state_dict_metadata"], data.state["storage_data"]
        spans = {_place(index): _span(info) for index, info in places.items()}
        errors = ErrorCollector(f"{path} does not describe tensors in files beside it", CheckpointError)
        _check_files(folder, spans, errors)
        tensors, objects = {}, {}
        for name, found in described.items():
            if type(name) is not str or type(found).__name__ not in ("TensorStorageMetadata", "BytesStorageMetadata"):
                raise ValueError(f"{name!r} is a {type(found).__name__}")
            if type(found).__name__ == "BytesStorageMetadata":
                if (name, None) in spans:
                    objects[name] = spans[name, None]
                else:
                    errors.add(name, "a place in a file", "none")
                continue
            entry = _entry(name, found, spans, errors)
            if entry:
                tensors[name] = entry
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(Problem(f"{path}", "the metadata of a distributed checkpoint", found)) from None
    errors.raise_if_any()
    return Contents(tensors, objects)


def pickled(tensors: Mapping[str, Entry], objects: Mapping[str, tuple[str, int, int]]) -> bytes:
    """The metadata of tensors and of objects (file, offset and length of what torch.save wrote of them)."""
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described, places = {}, {}
    for name, entry in tensors.items():
        blocks = [
            records.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape)) for chunk in entry.chunks
        ]
        properties = records.TensorProperties(dtype=entry.dtype)
        described[name] = records.TensorStorageMetadata(properties, torch.Size(entry.shape), blocks)
        for chunk in entry.chunks:
            places[records.MetadataIndex(name, chunk.offset)] = _StorageInfo(chunk.file, chunk.start, chunk.length)
    for name, span in objects.items():
        described[name] = records.BytesStorageMetadata()
        places[records.MetadataIndex(name)] = _StorageInfo(*span)
    return pickle.dumps(records.Metadata(described, storage_data=places, version=VERSION))


def _unpickled(path: Path) -> PickleStub:
    try:
        with path.open("rb") as file:
            data = _Unpickler(file).load()
    except FileNotFoundError:
        raise CheckpointError(Problem(f"{path}", "a file", "nothing there")) from None
    except _Refused as error:
        hint = "It is not loaded: loading it could run code."
        raise CheckpointError(Problem(f"{path}", "torch's records of chunks", f"{error}", hint)) from None
    except _DAMAGE as error:
        found = f"{type(error).__name__}: {error}"
        raise CheckpointError(Problem(f"{path}", "a whole pickle", found, "Fetch it again.")) from None
    pickle_limits.check_tree(f"{path}", data)
    if type(data).__name__ != "Metadata":
        raise CheckpointError(Problem(f"{path}", "torch's Metadata", type(data).__name__))
    return data


def _place(index: PickleStub) -> tuple[str, tuple[int, ...] | None]:
    offset = index.state.get("offset")
    return index.state["fqn"], None if offset is None else _sizes(offset)


def _span(info: PickleStub) -> tuple[str, int, int]:
    file, start, length = (info.state[name] for name in ("relative_path", "offset", "length"))
    if info.state.get("transform_descriptors"):
        raise ValueError(f"{file}: its bytes are transformed, {info.state['transform_descriptors']}")
    if type(file) is not str or Path(file).name != file or file in (".", ".."):
        raise ValueError(f"{file!r} is no name of a file beside it")
    return (file, *_sizes((start, length)))


def _sizes(found: object) -> tuple[int, ...]:
    if not isinstance(found, tuple | list) or not all(type(size) is int and 0 <= size < 1 << 62 for size in found):
        raise ValueError(f"{found!r} are no sizes")
    return tuple(found)


def _check_files(folder: Path, spans: Mapping, errors: ErrorCollector) -> None:
    """Every file is there, and as long as the last chunk in it says."""
    ends: dict[str, int] = {}
    for file, start, length in spans.values():
        ends[file] = max(ends.get(file, 0), start + length)
    for file, end in sorted(ends.items()):
        path = folder / file
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            errors.add(file, "a file", "nothing there", "Fetch it again.")
        elif size < end:
            errors.add(file, f"at least {end} bytes", size, "It is cut off: fetch it again.")
    for path in sorted(folder.glob("*.distcp")):
        if path.name not in ends:
            errors.add(path.name, "only files that the metadata name", "one more", "Is it another checkpoint's?")


def _entry(name: str, found: PickleStub, spans: Mapping, errors: ErrorCollector) -> Entry | None:
    shape, dtype = _sizes(found.state["size"]), found.state["properties"].state[0]
    if type(dtype) is not torch.dtype:
        raise ValueError(f"{name}: {dtype!r} is no dtype")
    blocks = [(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])) for chunk in found.state["chunks"]]
    missing = [offset for offset, _ in blocks if (name, offset) not in spans]
    if missing:
        errors.add(name, f"{len(blocks)} chunks in its files", f"{len(missing)} that are in none")
        return None
    if not _tiles(shape, blocks):
        errors.add(name, f"chunks that make up {shape}", f"{len(blocks)} that overlap, leave gaps or reach beyond")
        return None
    chunks = [Chunk(offset, size, *spans[name, offset]) for offset, size in sorted(blocks)]
    return Entry(shape, dtype, tuple(chunks))


def _tiles(shape: tuple[int, ...], blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """True where blocks are the cells of a grid over a shape, each once."""
    if any(len(offset) != len(shape) or len(size) != len(shape) for offset, size in blocks):
        return False
    cells, number = dict(blocks), 1
    widths = []
    for dim, size in enumerate(shape):
        edges = [*sorted({offset[dim] for offset in cells}), size]
        if edges[0] != 0:
            return False
        widths.append({start: stop - start for start, stop in pairwise(edges)})
        number *= len(widths[-1])
    whole = all(
        tuple(size) == tuple(width[start] for width, start in zip(widths, offset, strict=True))
        for offset, size in cells.items()
    )
    return whole and number == len(cells) == len(blocks)
