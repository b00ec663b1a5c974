"""Reads files that torch.save wrote before torch 1.6: five pickles, then the storages one after the other.

    magic number, version, system, object, keys of the storages
    for each key: number of elements (8 bytes), elements

The object refers to storages by key. torch itself leaves a storage that is not in the list as it was allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_ligo.checkpoint.io.pickles.tensor_unpickler import TensorUnpickler

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
LENGTH = struct.Struct("<q")


def load(file: BinaryIO, size: int, stand_ins: Sequence[tuple[object, str]]) -> object:
    """Returns the object of a file of `size` bytes, its tensors filled from the file.

    Raises ValueError, or an error of unpickling, unless the file holds each of its storages once and nothing else.
    """
    bounded = _BoundedFile(file, size)
    storages: dict[str, Tensor] = {}
    claimed = 0

    def find_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal claimed
        if key not in storages:
            claimed += numel * dtype.itemsize
            if claimed > size:
                raise ValueError(f"storages of {claimed} bytes and more in a file of {size}")
            # The system gives out zeros without a write, so that a claim costs nothing.
            storages[key] = torch.zeros(numel * dtype.itemsize, dtype=torch.uint8).view(dtype)
        if (storages[key].dtype, storages[key].numel()) != (dtype, numel):
            raise ValueError(f"storage {key[:40]!r} in two sizes or dtypes")
        return storages[key]

    def unpickle(allowed: Sequence[tuple[object, str]] = ()) -> object:
        return TensorUnpickler(bounded, find_storage, allowed).load()

    for name, expected in (("magic number", MAGIC), ("version", VERSION)):
        if unpickle() != expected:
            raise ValueError(f"another {name} than torch's")
    system = unpickle()
    if isinstance(system, dict) and not system.get("little_endian", True):
        raise ValueError("numbers in another byte order")
    tree = unpickle(stand_ins)
    _fill(bounded, unpickle(), storages)
    if bounded.remaining:
        raise ValueError(f"{bounded.remaining} bytes after the last storage")
    return tree


def _fill(file: _BoundedFile, keys: object, storages: dict[str, Tensor]) -> None:
    """Reads every storage, in the order of `keys`."""
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
        raise ValueError("a list of storages that names one twice")
    if set(keys) != set(storages):
        missing, further = set(storages) - set(keys), set(keys) - set(storages)
        raise ValueError(f"{len(missing)} storages without their numbers, {len(further)} that nothing refers to")
    for key in keys:
        elements = storages[key]
        (numel,) = LENGTH.unpack(file.read(LENGTH.size))
        if numel != elements.numel():
            raise ValueError(f"a storage of {numel} elements for one of {elements.numel()}")
        file.readinto(elements.view(torch.uint8).numpy())


class _BoundedFile:
    """A file that refuses at once to read beyond its end, whatever length a pickle claims."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self.remaining = file, size

    def read(self, count: int = -1) -> bytes:
        if count < 0 or count > self.remaining:
            raise EOFError("the file ends too early")
        self.remaining -= count
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline()
        self.remaining -= len(line)
        return line

    def readinto(self, buffer: np.ndarray) -> None:
        if len(buffer) > self.remaining:
            raise EOFError("the file ends too early")
        self.remaining -= self._file.readinto(buffer)
