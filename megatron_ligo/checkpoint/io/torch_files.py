"""Reads torch.save files, mapped and without running code: tensors, plain values and classes that the caller allows."""

from __future__ import annotations

import io
import pickle
import struct
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import pickle_enums, pickle_limits
from megatron_ligo.checkpoint.io.file_layout import data_offset
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

# The exceptions that torch raises for files that are damaged or not its own.
DAMAGE = (
    BadZipFile, OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError, IndexError,
    AssertionError, struct.error,
)  # fmt: skip


def load(path: Path, stand_ins: Sequence[tuple[object, str]] = (), mapped: bool = True) -> object:
    """Reads what torch.save wrote, on the CPU; with `mapped`, tensors are views of the mapped file.

    stand_ins: (object, "module.name") for classes that the file may name; inert objects take their place.
    Raises CheckpointError for a damaged file, and for one that names any other class.
    """
    if not path.is_file():
        raise CheckpointError(Problem(f"{path}", "a file", "something else" if path.exists() else "nothing there"))
    with damage_as_error(f"{path}"), _allow_only(stand_ins):
        tree = _load_checked(path, mapped)
    pickle_limits.check_tree(f"{path}", tree)
    return tree


def load_part(path: Path, start: int, length: int, stand_ins: Sequence[tuple[object, str]] = ()) -> object:
    """Like `load`, for an archive within a file; its tensors are copies."""
    with damage_as_error(f"{path} at {start}"), _allow_only(stand_ins), path.open("rb") as file:
        tree = _load_checked(FileWindow(file, start, length), mapped=False)
    pickle_limits.check_tree(f"{path} at {start}", tree)
    return tree


def _load_checked(file: Path | BinaryIO, mapped: bool) -> object:
    zipped = is_zipfile(file)
    sizes: list[int] = []

    def record_size(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage:
        sizes.append(storage.nbytes())
        return storage

    records = _record_sizes(file) if zipped else None
    if not isinstance(file, Path):
        file.seek(0)
    # The format of torch before 1.6 is no zip archive and cannot be mapped.
    tree = torch.load(file, map_location=record_size, weights_only=True, mmap=mapped and zipped)
    if zipped and sorted(sizes) != records:
        raise BadZipFile("storages of other sizes than their records")
    return tree


def map_tensor(path: Path, start: int, length: int) -> Tensor:
    """Reads the single tensor of a torch.save archive within a file, in its stored shape and dtype.

    Returns a view of the mapped file if its bytes are aligned to its items, else a copy. Raises CheckpointError as
    `load` does.
    """
    with damage_as_error(f"{path} at {start}"), _allow_only(()), path.open("rb") as file:
        window = FileWindow(file, start, length)
        if not is_zipfile(window):
            raise BadZipFile("no archive")
        window.seek(0)
        # On "meta" no bytes are read and no memory is allocated, whatever size an archive claims.
        frame = torch.load(window, map_location="meta", weights_only=True)
        if not isinstance(frame, Tensor) or frame.layout is not torch.strided:
            raise ValueError("no tensor")
        offset, size = _only_storage(window)
        if size != frame.untyped_storage().nbytes():
            raise ValueError(f"{size} bytes for a tensor of {frame.untyped_storage().nbytes()}")
        # A private map: changes to the tensor do not reach the file.
        data = np.memmap(file, np.uint8, "c", start + offset, (size,)) if size else np.empty(0, np.uint8)
        if data.ctypes.data % frame.dtype.itemsize:
            data = np.array(data)
        flat = torch.from_numpy(data).view(frame.dtype)
        return flat.as_strided(frame.size(), frame.stride(), frame.storage_offset())


def _only_storage(window: BinaryIO) -> tuple[int, int]:
    """Returns offset and size of the data of an archive with one storage. Raises ValueError for any other archive."""
    with ZipFile(window) as archive:
        infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        storages = [info for name, info in infos.items() if name.startswith("data/")]
        order = infos.get("byteorder")
        plain = all(info.compress_type == ZIP_STORED for info in infos.values())
        native = not order or (plain and archive.read(order) == sys.byteorder.encode())
    if len(storages) != 1 or not plain or not native:
        raise ValueError("not one storage, stored plainly in this machine's byte order")
    offset = data_offset(window, storages[0])
    size = storages[0].file_size
    if size != storages[0].compress_size or offset + size > window.length:
        raise ValueError("a storage that does not lie within its archive")
    return offset, size


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
def _allow_only(stand_ins: Sequence[tuple[object, str]]) -> Iterator[None]:
    """Allows files to name these classes, and none that another library of this process has allowed."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    if stand_ins:
        member = pickle_enums.enum_stand_ins(kind for kind, _ in stand_ins)
        torch.serialization.add_safe_globals([*stand_ins, (member, ".".join(pickle_enums.GETATTR))])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


@contextmanager
def damage_as_error(where: str) -> Iterator[None]:
    """Turns the errors of reading a damaged or hostile torch.save file into CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(Problem(where, "a file", "nothing there")) from None
    except pickle.UnpicklingError as error:
        # Without torch's own advice, which is to trust the file.
        reason = str(error).split("Check the documentation")[0].split("Please use")[0]
        reason = " ".join(reason.rpartition("WeightsUnpickler error:")[2].split())
        hint = "Loading it could run code."
        raise CheckpointError(Problem(where, "tensors and plain values", reason, hint)) from None
    except DAMAGE as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise CheckpointError(Problem(where, "a whole file of torch.save", reason, "Download it again.")) from None


def _record_sizes(file: Path | BinaryIO) -> list[int]:
    """Returns the sizes of the storages' records.

    torch maps each record as it lies in the archive and trusts the pickle about its size: a compressed or shorter
    record would read as other numbers.
    """
    with ZipFile(file) as archive:
        records = archive.infolist()
    names = [record.filename for record in records]
    if len(set(names)) < len(names) or any(record.compress_type != ZIP_STORED for record in records):
        raise BadZipFile("records that are packed, or there twice")
    return sorted(record.file_size for record in records if record.filename.partition("/")[2].startswith("data/"))


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
        elif value.layout is not torch.strided or not value.is_floating_point():
            errors.add(name, "a dense tensor of floating-point numbers", f"{value.layout}, {value.dtype}")
    errors.raise_if_any()
    return state
