"""Lays out files of tensors (safetensors or torch.save archives) before they are filled: each tensor's byte range."""

from __future__ import annotations

import errno
import json
import struct
import zipfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.serialization import skip_data

from megatron_ligo.common.atomic_files import fsync_descriptor
from megatron_ligo.common.recent_values import RecentValues

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
# torch.save aligns tensors to this many bytes.
ALIGNMENT = 64
# Kinds of values whose repr says all of them.
PLAIN = (type(None), bool, int, float, str, bytes)
# The most skeletons that are kept, and their bytes.
MAX_SKELETONS, MAX_SKELETON_BYTES = 256, 4 << 20
# Bytes written to find out why a disk fails; more than any skeleton has.
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed only when it is written. `make` returns it in this shape and dtype, on the CPU.

    Without `make` it is all zeros, which are neither computed nor written: their bytes in the file stay a hole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor] | None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpan:
    """A tensor's bytes in a file. checksums: offsets of their CRC-32 in a zip archive's headers."""

    name: str
    offset: int
    checksums: tuple[int, ...]
    tensor: LazyTensor


def lay_out_safetensors(
    tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]
) -> tuple[bytes, list[TensorSpan]]:
    """Returns the header of a safetensors file and the spans of its tensors, which follow it without a gap."""
    # Wide dtypes first, as the library orders them: this aligns each tensor to its item size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = [], 0
    for name, lazy in ordered:
        start, end = end, end + lazy.nbytes
        offsets.append(start)
        dtype = SAFETENSORS_DTYPES[lazy.dtype]
        table[name] = {"dtype": dtype, "shape": list(lazy.shape), "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    spans = [
        TensorSpan(name, len(header) + start, (), lazy) for (name, lazy), start in zip(ordered, offsets, strict=True)
    ]
    return header, spans


def write_torch_skeleton(path: Path, tree: object) -> list[TensorSpan]:
    """Writes what torch.save writes for a tree of plain data and `LazyTensor`s, with holes for the tensors' bytes.

    A `LazyTensor` that occurs several times in the tree is stored once. Files of one name and one tree have one
    skeleton: the layers of a model differ in their tensors alone, and torch.save takes a millisecond.
    """
    tensors: dict[int, tuple[int, str, LazyTensor]] = {}
    # The archive contains its file's name.
    key = (path.name, _describe(tree, "", tensors))
    skeleton = _recent_skeletons.get(key)
    if skeleton is None:
        skeleton = _save_skeleton(path, tree)
        _recent_skeletons.put(key, skeleton, sum(len(part) for _, part in skeleton.frame))
    else:
        skeleton.write(path)
    return [
        TensorSpan(name, *place, lazy) for (_, name, lazy), place in zip(tensors.values(), skeleton.places, strict=True)
    ]


@dataclass(frozen=True)
class Skeleton:
    """A torch.save archive without its tensors' bytes.

    places: each tensor's offset, and those of its checksums. frame: (offset, bytes) of all else.
    """

    size: int
    places: tuple[tuple[int, tuple[int, ...]], ...]
    frame: tuple[tuple[int, bytes], ...]

    def write(self, path: Path) -> None:
        try:
            with path.open("wb") as file:
                for offset, part in self.frame:
                    file.seek(offset)
                    file.write(part)
                file.truncate(self.size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{path}") from error


_recent_skeletons: RecentValues[Skeleton] = RecentValues(MAX_SKELETONS, MAX_SKELETON_BYTES)


def _save_skeleton(path: Path, tree: object) -> Skeleton:
    """Writes the skeleton by torch, and returns it."""
    tensors: dict[int, tuple[LazyTensor, Tensor]] = {}
    # Untouched storages take no memory; torch numbers them in the order in which it meets them.
    hollow = _replace_tensors(tree, tensors)
    try:
        with skip_data():
            torch.save(hollow, path)
    except RuntimeError as error:
        raise explain_write_failure(path, error) from error
    records = _find_records(path)
    spans = [TensorSpan("", *records[f"data/{i}"], lazy) for i, (lazy, _) in enumerate(tensors.values())]
    size = path.stat().st_size
    with path.open("rb") as file:
        frame = []
        for start, stop in _frame_ranges(spans, size):
            file.seek(start)
            frame.append((start, file.read(stop - start)))
    return Skeleton(size, tuple((span.offset, span.checksums) for span in spans), tuple(frame))


def explain_write_failure(path: Path, error: RuntimeError) -> OSError:
    """Returns the OSError behind torch's `iostream error`, found by writing PROBE_BYTES to the path."""
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            fsync_descriptor(file.fileno())
    except OSError as cause:
        return cause if cause.filename else OSError(cause.errno, cause.strerror, f"{path}")
    return OSError(errno.EIO, f"{error}", f"{path}")


def write_torch_archives(
    path: Path, trees: Mapping[str, object]
) -> tuple[list[TensorSpan], dict[str, tuple[int, int]]]:
    """Writes skeletons one after the other into a file. Returns tensor spans, and each archive's offset and length.

    Archives begin at multiples of `ALIGNMENT`, so that their tensors stay aligned in the file.
    """
    # The name that torch.save gives to an archive without a file name.
    skeleton = path.with_name("archive")
    spans, archives, end = [], {}, 0
    with path.open("wb") as file:
        for name, tree in trees.items():
            skeleton_spans = write_torch_skeleton(skeleton, tree)
            start, size = -(-end // ALIGNMENT) * ALIGNMENT, skeleton.stat().st_size
            archives[name] = (start, size)
            end = start + size
            for span in skeleton_spans:
                checksums = tuple(start + checksum for checksum in span.checksums)
                spans.append(TensorSpan(f"{name}{span.name}", start + span.offset, checksums, span.tensor))
            with skeleton.open("rb") as archive:
                for begin, stop in _frame_ranges(skeleton_spans, size):
                    archive.seek(begin)
                    file.seek(start + begin)
                    file.write(archive.read(stop - begin))
        file.truncate(end)
    skeleton.unlink(missing_ok=True)
    return spans, archives


def has_same_frame(path: Path, skeleton: Path, spans: Sequence[TensorSpan]) -> bool:
    """True if a file equals a skeleton everywhere but in its tensors' bytes and their checksums."""
    end = skeleton.stat().st_size
    if path.stat().st_size != end:
        return False
    with path.open("rb") as file, skeleton.open("rb") as expected:
        for start, stop in _frame_ranges(spans, end):
            file.seek(start)
            expected.seek(start)
            if file.read(stop - start) != expected.read(stop - start):
                return False
    return True


def _frame_ranges(spans: Sequence[TensorSpan], end: int) -> list[tuple[int, int]]:
    """Returns the byte ranges of a file outside of its tensors and their checksums."""
    edges = [0]
    for span in spans:
        edges += [span.offset, span.offset + span.tensor.nbytes]
        for checksum in span.checksums:
            edges += [checksum, checksum + CHECKSUM]
    edges = [*sorted(edges), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _replace_tensors(tree: object, tensors: dict[int, tuple[LazyTensor, Tensor]]) -> object:
    """Returns the tree with an uninitialised tensor for each `LazyTensor`, and collects both in `tensors` by id."""
    if isinstance(tree, LazyTensor):
        _, hollow = tensors.setdefault(id(tree), (tree, torch.empty(tree.shape, dtype=tree.dtype)))
        return hollow
    if isinstance(tree, dict):
        return {key: _replace_tensors(value, tensors) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_replace_tensors(value, tensors) for value in tree)
    return tree


def _describe(tree: object, name: str, tensors: dict[int, tuple[int, str, LazyTensor]]) -> Hashable:
    """Describes all that torch.save stores of a tree but the tensors' bytes; collects its tensors by id, with number
    and name.
    """
    if isinstance(tree, LazyTensor):
        number, *_ = tensors.setdefault(id(tree), (len(tensors), name, tree))
        return LazyTensor, number, tree.shape, tree.dtype
    if isinstance(tree, dict):
        # A key of another type may be equal: True and 1.
        items = [(type(key), key, _describe(value, f"{name}/{key}", tensors)) for key, value in tree.items()]
        return type(tree), tuple(items)
    if isinstance(tree, list | tuple):
        return type(tree), tuple(_describe(value, f"{name}/{i}", tensors) for i, value in enumerate(tree))
    # -0.0 and 0.0 are equal; other kinds of objects, which may change, are equal to nothing.
    return type(tree), repr(tree) if isinstance(tree, PLAIN) else object()


def _find_records(path: Path) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Returns the data offset of each record of a zip archive, and the two offsets of its CRC-32."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entry = archive.start_dir
        for info in archive.infolist():
            data = data_offset(file, info)
            # A descriptor follows the data: its signature (4 bytes), then the CRC-32. Empty records have none.
            checksums = (data + info.file_size + 4, entry + 16) if info.file_size else ()
            records[info.filename.partition("/")[2]] = (data, checksums)
            entry += CENTRAL_HEADER + sum(_unpack_at(file, entry + 28, "<HHH"))
    return records


def data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Returns the offset of a record's data in a zip archive."""
    return info.header_offset + LOCAL_HEADER + sum(_unpack_at(file, info.header_offset + 26, "<HH"))


def _unpack_at(file: BinaryIO, offset: int, form: str) -> tuple[int, ...]:
    file.seek(offset)
    return struct.unpack(form, file.read(struct.calcsize(form)))
