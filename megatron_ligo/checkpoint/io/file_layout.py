"""Where the bytes of each tensor lie in a file of tensors: the file is laid out first and filled tensor by tensor."""

from __future__ import annotations

import errno
import json
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from megatron_ligo.common.atomic_files import fsync_descriptor

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# Sizes of the fixed parts of a zip archive's headers.
LOCAL_HEADER, CENTRAL_HEADER, CHECKSUM = 30, 46, 4
# torch.save aligns the tensors' bytes to so many.
ALIGNMENT = 64
# More than a skeleton takes.
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written comes. `make` gives this shape and dtype, on the CPU.

    Without `make` it is zeros, which are never made: their place in the file stays a hole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor] | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor's bytes lie in a file. checksums: offsets at which a zip archive notes their CRC-32."""

    name: str
    offset: int
    checksums: tuple[int, ...]
    later: LazyTensor


def lay_out_safetensors(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorSpan]]:
    """The header of a safetensors file and the places of its tensors, which follow it without a gap."""
    # Wide dtypes first, as the library orders them: each tensor is then aligned to its own items.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = [], 0
    for name, later in ordered:
        start, end = end, end + later.nbytes
        offsets.append(start)
        dtype = SAFETENSORS_DTYPES[later.dtype]
        table[name] = {"dtype": dtype, "shape": list(later.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    places = [
        TensorSpan(name, len(header) + start, (), later) for (name, later), start in zip(ordered, offsets, strict=True)
    ]
    return header, places


def write_torch_skeleton(path: Path, tree: object) -> list[TensorSpan]:
    """Writes what torch.save writes for a tree of plain data and `LazyTensor`, but for the tensors' bytes (holes).

    A `LazyTensor` that the tree holds in several places has bytes once."""
    found: dict[int, tuple[str, LazyTensor, Tensor]] = {}
    # Storages that nobody touches take no memory; torch numbers them in the order in which it meets them.
    hollow = _replace_tensors(tree, "", found)
    try:
        with skip_data():
            torch.save(hollow, path)
    except RuntimeError as error:
        raise explain_write_failure(path, error) from error
    records = _find_records(path)
    return [
        TensorSpan(name, *records[f"data/{number}"], later) for number, (name, later, _) in enumerate(found.values())
    ]


def explain_write_failure(path: Path, error: RuntimeError) -> OSError:
    """torch's writer fails without a reason (`iostream error`): the disk, asked for some room, gives it."""
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            fsync_descriptor(file.fileno())
    except OSError as found:
        return found if found.filename else OSError(found.errno, found.strerror, f"{path}")
    return OSError(errno.EIO, f"{error}", f"{path}")


def write_torch_archives(
    path: Path, trees: Mapping[str, object]
) -> tuple[list[TensorSpan], dict[str, tuple[int, int]]]:
    """Such skeletons, one after the other in one file; also where each begins, and its length.

    Where tensors are aligned in their archives, they are in the file.
    """
    # What torch.save calls an archive whose file has no name.
    one = path.with_name("archive")
    places, spans, end = [], {}, 0
    with path.open("wb") as file:
        for name, tree in trees.items():
            found = write_torch_skeleton(one, tree)
            start, size = -(-end // ALIGNMENT) * ALIGNMENT, one.stat().st_size
            spans[name] = (start, size)
            end = start + size
            for place in found:
                checksums = tuple(start + checksum for checksum in place.checksums)
                places.append(TensorSpan(f"{name}{place.name}", start + place.offset, checksums, place.later))
            with one.open("rb") as archive:
                for begin, stop in _frame_ranges(found, size):
                    archive.seek(begin)
                    file.seek(start + begin)
                    file.write(archive.read(stop - begin))
        file.truncate(end)
    one.unlink(missing_ok=True)
    return places, spans


def has_same_frame(path: Path, skeleton: Path, places: Sequence[TensorSpan]) -> bool:
    """True where a file is its skeleton but for the tensors' bytes and their checksums."""
    end = skeleton.stat().st_size
    if path.stat().st_size != end:
        return False
    with path.open("rb") as one, skeleton.open("rb") as other:
        for start, stop in _frame_ranges(places, end):
            one.seek(start)
            other.seek(start)
            if one.read(stop - start) != other.read(stop - start):
                return False
    return True


def _frame_ranges(places: Sequence[TensorSpan], end: int) -> list[tuple[int, int]]:
    """The stretches of a file that are not its tensors' bytes and their checksums."""
    edges = [0]
    for place in places:
        edges += [place.offset, place.offset + place.later.nbytes]
        for checksum in place.checksums:
            edges += [checksum, checksum + CHECKSUM]
    edges = [*sorted(edges), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _replace_tensors(tree: object, name: str, found: dict[int, tuple[str, LazyTensor, Tensor]]) -> object:
    if isinstance(tree, LazyTensor):
        *_, hollow = found.setdefault(id(tree), (name, tree, torch.empty(tree.shape, dtype=tree.dtype)))
        return hollow
    if isinstance(tree, dict):
        return {key: _replace_tensors(value, f"{name}/{key}", found) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_replace_tensors(value, f"{name}/{i}", found) for i, value in enumerate(tree))
    return tree


def _find_records(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Offset of the data of each record of a zip archive, and the two offsets of its CRC-32."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.start_dir
        for info in archive.infolist():
            data = data_offset(file, info)
            # After the data comes a descriptor: its signature (4 bytes), then the CRC-32. After none, nothing.
            checksums = (data + info.file_size + 4, entry + 16) if info.file_size else ()
            found[info.filename.partition("/")[2]] = (data, checksums)
            entry += CENTRAL_HEADER + sum(_unpack_at(file, entry + 28, "<HHH"))
    return found


def data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the data of a record of a zip archive begin."""
    return info.header_offset + LOCAL_HEADER + sum(_unpack_at(file, info.header_offset + 26, "<HH"))


def _unpack_at(file: BinaryIO, offset: int, form: str) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack(form, file.read(struct.calcsize(form)))
