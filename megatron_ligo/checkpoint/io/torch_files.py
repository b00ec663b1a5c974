"""Reads torch.save files, mapped and without running code: tensors, plain values and classes that the caller allows.

Every storage that a file names must be in it, once, in full and nowhere else. Checksums are compared when a storage is
first read: at once where it is copied, by `check_stored` where it is mapped.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import legacy_torch_file, tensor_check, zip_records
from megatron_ligo.checkpoint.io.pickles import pickle_limits
from megatron_ligo.checkpoint.io.pickles.tensor_unpickler import TensorUnpickler
from megatron_ligo.checkpoint.io.zip_records import ZipRecord
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

# The exceptions that damaged files, and those that are not torch's own, raise here.
DAMAGE = (
    BadZipFile, OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, OverflowError,
    MemoryError, AssertionError, struct.error,
)  # fmt: skip
PICKLE, BYTE_ORDER = "data.pkl", "byteorder"
BYTE_ORDERS = (b"little", b"big")
# A tensor of fewer bytes, in an archive within a file, is copied.
SMALL_BYTES = 1 << 16


def load(path: Path, stand_ins: Sequence[tuple[object, str]] = (), mapped: bool = True) -> object:
    """Reads what torch.save wrote, on the CPU; with `mapped`, tensors are views of the mapped file.

    stand_ins: (object, "module.name") for classes that the file may name; the objects take their place.
    Raises CheckpointError for a damaged file, one that names any other class, and one with tensors that are not plain.
    """
    if not path.is_file():
        raise CheckpointError(Problem(f"{path}", "a file", "something else" if path.exists() else "nothing there"))
    with damage_as_error(f"{path}"), path.open("rb") as file:
        if file.read(len(zip_records.MAGIC)) == zip_records.MAGIC:
            tree = _load_archive(file, 0, path.stat().st_size, stand_ins, mapped)
        else:
            # The form before torch 1.6 does not align its storages: they are copied.
            file.seek(0)
            tree = legacy_torch_file.load(file, path.stat().st_size, stand_ins)
    return _check(f"{path}", tree)


def load_part(path: Path, start: int, length: int, stand_ins: Sequence[tuple[object, str]] = ()) -> object:
    """Like `load`, for an archive within a file; its tensors are copies."""
    with damage_as_error(f"{path} at {start}"), path.open("rb") as file:
        tree = _load_archive(file, start, length, stand_ins, mapped=False)
    return _check(f"{path} at {start}", tree)


def map_tensor(path: Path, start: int, length: int, check_bytes: bool = True) -> Tensor:
    """Reads the single tensor of a torch.save archive within a file, in its stored shape and dtype.

    Returns a view of the mapped file if its bytes are aligned to its items, else a copy. check_bytes: compares their
    checksum. Raises CheckpointError as `load` does.
    """
    where = f"{path} at {start}"
    with damage_as_error(where), path.open("rb") as file:
        tensor = tensor_check.check_tensor(where, _load_archive(file, start, length, (), mapped=True))
    if not check_bytes:
        tensor.untyped_storage().unchecked_record = None
    return check_stored(where, tensor)


def check_stored(where: str, tensor: Tensor) -> Tensor:
    """Returns a mapped tensor of any shape once the bytes of its storage have their checksum, which is compared once.

    Raises CheckpointError if they do not.
    """
    storage = tensor.untyped_storage()
    record: ZipRecord | None = getattr(storage, "unchecked_record", None)
    if record is not None:
        with damage_as_error(where):
            record.check(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        storage.unchecked_record = None
    return tensor


def _check(where: str, tree: object) -> object:
    pickle_limits.check_tree(where, tree)
    tensor_check.check_tree(where, tree)
    return tree


def _load_archive(
    file: BinaryIO, start: int, length: int, stand_ins: Sequence[tuple[object, str]], mapped: bool
) -> object:
    records = zip_records.read_records(FileWindow(file, start, length), length)
    storages = ArchiveStorages(file, start, length, records, mapped)
    if PICKLE not in records:
        raise BadZipFile(f"no record {PICKLE}")
    tree = TensorUnpickler(io.BytesIO(storages.read(PICKLE)), storages.find, stand_ins).load()
    storages.check_all_used()
    return tree


class ArchiveStorages:
    """The storages of an archive within a file, by key. Raises BadZipFile for one that its record does not hold."""

    def __init__(self, file: BinaryIO, start: int, length: int, records: Mapping[str, ZipRecord], mapped: bool):
        self._file, self._start = file, start
        self._records = records
        self._mapped, self._whole = mapped, None
        if mapped and start == 0:
            # A private map, as all here: changes to a tensor do not reach the file. It keeps no file open.
            self._whole = torch.UntypedStorage.from_file(file.name, False, length)
        order = self.read(BYTE_ORDER) if BYTE_ORDER in records else BYTE_ORDERS[0]
        if order not in BYTE_ORDERS:
            raise BadZipFile(f"byte order {order[:20]!r}")
        self._is_native = order == sys.byteorder.encode()
        self._elements: dict[str, Tensor] = {}

    def read(self, name: str) -> bytes:
        """Reads a whole record."""
        record = self._records[name]
        self._file.seek(self._start + record.offset)
        data = self._file.read(record.size)
        record.check(data)
        return data

    def find(self, key: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Returns the elements of a storage, (numel,) in its dtype: a view of the mapped file, or a copy."""
        if key not in self._elements:
            record = self._records.get(f"data/{key}")
            if record is None or record.size != numel * dtype.itemsize:
                found = "no record" if record is None else f"{record.size} bytes"
                raise BadZipFile(f"storage {key[:40]!r} of {numel * dtype.itemsize} bytes: {found}")
            self._elements[key] = self._read_storage(record, dtype)
        elements = self._elements[key]
        if (elements.dtype, elements.numel()) != (dtype, numel):
            raise BadZipFile(f"storage {key[:40]!r} as {elements.dtype} and as {dtype}")
        return elements

    def check_all_used(self) -> None:
        """Checks that the pickle refers to every storage of the archive."""
        unused = {name for name in self._records if name.startswith("data/")} - {
            f"data/{key}" for key in self._elements
        }
        if unused:
            raise BadZipFile(f"{len(unused)} storages that nothing refers to, such as {min(unused)}")

    def _read_storage(self, record: ZipRecord, dtype: torch.dtype) -> Tensor:
        if not record.size:
            return torch.empty(0, dtype=dtype)
        data = self._map_record(record) if self._mapped and self._is_native else None
        if data is not None and data.data_ptr() % dtype.itemsize == 0:
            data.untyped_storage().unchecked_record = record
            return data.view(dtype)
        content = np.frombuffer(bytearray(self.read(record.name)), np.uint8)
        if not self._is_native and dtype.itemsize > 1:
            content.view(f"u{dtype.itemsize}").byteswap(inplace=True)
        return torch.from_numpy(content).view(dtype)

    def _map_record(self, record: ZipRecord) -> Tensor | None:
        """Maps a record's bytes, (size,) uint8; None for a small one of an archive within a file.

        Each map of a part of a file keeps it open: a process may have only a thousand.
        """
        if self._whole is not None:
            part = self._whole[record.offset : record.offset + record.size]
            return torch.empty(0, dtype=torch.uint8).set_(part)
        if record.size < SMALL_BYTES:
            return None
        start = self._start + record.offset
        return torch.from_numpy(np.memmap(self._file, np.uint8, "c", start, (record.size,)))


class FileWindow(io.RawIOBase):
    """A part of an open file as a read-only file."""

    def __init__(self, file: BinaryIO, start: int, length: int):
        self._file = file
        self._start = start
        self._at = 0
        self.length = length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.length}[whence]
        if base + offset < 0:
            raise ValueError("before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        size = max(min(len(buffer), self.length - self._at), 0)
        self._file.seek(self._start + self._at)
        data = self._file.read(size)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


@contextmanager
def damage_as_error(where: str) -> Iterator[None]:
    """Turns the errors of reading a damaged or hostile torch.save file into CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(Problem(where, "a file", "nothing there")) from None
    except pickle.UnpicklingError as error:
        hint = "Loading it could run code."
        raise CheckpointError(Problem(where, "tensors and plain values", f"{error}", hint)) from None
    except DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(Problem(where, "a whole file of torch.save", reason, "Download it again.")) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a dict of dense floating-point tensors by name, in their stored shapes.

    Raises CheckpointError if the file holds anything else.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise CheckpointError(Problem(f"{path}", "tensors by name", type(state).__name__))
    errors = ErrorCollector(f"{path} holds values that are not weights", CheckpointError)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            errors.add(repr(name), "a tensor by its name", type(value).__name__)
        elif not value.is_floating_point():
            errors.add(name, "a tensor of floating-point numbers", f"{value.dtype}")
    errors.raise_if_any()
    return state
