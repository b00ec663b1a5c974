"""Tensors onto the disk by a few threads, while the next ones are being made; fsynced as they go.

Hashing, copying and fsync leave Python's lock alone, so threads suffice. What waits to be written is bounded.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Condition, Lock

import numpy as np
import xxhash

from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.io.file_layout import LazyTensor, TensorSpan
from megatron_ligo.common.atomic_files import fsync_descriptor

WORKERS = 2
# What may wait in memory; a tensor that is larger waits alone.
WAITING_BYTES = 128 << 20
# So much of a file is put on the disk at a time, beside the writing: one fsync at its end would stand still.
SYNC_BYTES = 256 << 20
# Small enough to be hashed and copied while in the processor's cache; writes of many MB also took up to eight times
# as long where the kernel looks for as large pieces of memory for them.
CHUNK = 1 << 19
ZEROS = 1 << 22

Done = Callable[[str], None]  # takes the digest of the bytes written


class ParallelWriter:
    """Takes tensors from one thread and writes them in others. `finish` waits for all and raises what went wrong."""

    def __init__(self, workers: int = WORKERS):
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write")
        self._room = Condition()
        self._waiting = 0
        self._jobs: list[Future] = []

    def put(self, file: OpenFile, place: TensorSpan, done: Done) -> None:
        """Makes a tensor (here) and has its bytes written. `done` is called in another thread, before the fsync."""
        size = place.later.nbytes
        with self._room:
            self._room.wait_for(lambda: not self._waiting or self._waiting + size <= WAITING_BYTES)
            self._waiting += size
        self._raise()
        data = _make(place)
        self._submit(self._put, file, place, data, done)

    def close(self, file: OpenFile) -> None:
        """No more comes for a file: it is fsynced once all is written."""
        if file.leave():
            self._submit(file.close)

    def finish(self) -> None:
        """Waits until everything is on the disk."""
        self._pool.shutdown(wait=True)
        self._raise()

    def abandon(self) -> None:
        """Drops what waits; what is being written ends."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _put(self, file: OpenFile, place: TensorSpan, data: np.ndarray, done: Done) -> None:
        try:
            done(file.write(place, data))
        finally:
            with self._room:
                self._waiting -= place.later.nbytes
                self._room.notify()
        if file.leave():
            file.close()

    def _submit(self, job: Callable, *arguments: object) -> None:
        self._jobs.append(self._pool.submit(job, *arguments))

    def _raise(self) -> None:
        ended = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if not job.done()]
        for job in ended:
            job.result()


class OpenFile:
    """A file that several threads write into at their places."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR)
        self._lock = Lock()
        self._users = 1
        self._unsynced = 0

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> bool:
        """True for the last one, who closes."""
        with self._lock:
            self._users -= 1
            return self._users == 0

    def write(self, place: TensorSpan, data: np.ndarray) -> str:
        """Returns the digest of the bytes."""
        found, crc = xxhash.xxh3_128(), 0
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            found.update(chunk)
            crc = zlib.crc32(chunk, crc) if place.checksums else 0
            self._write(chunk, place.offset + start)
        self._note(place, crc)
        with self._lock:
            self._unsynced += len(data)
            sync = self._unsynced >= SYNC_BYTES
            if sync:
                self._unsynced = 0
        if sync:
            with self._named():
                os.fdatasync(self._descriptor)
        return found.hexdigest()

    def leave_zeros(self, place: TensorSpan) -> None:
        """The place stays a hole; only an archive's checksum is written."""
        if place.checksums:
            self._note(place, _crc_of_zeros(place.later.nbytes))

    def close(self) -> None:
        try:
            with self._named():
                fsync_descriptor(self._descriptor)
        finally:
            os.close(self._descriptor)

    def _note(self, place: TensorSpan, crc: int) -> None:
        for offset in place.checksums:
            self._write(struct.pack("<I", crc), offset)

    def _write(self, data: bytes | np.ndarray, offset: int) -> None:
        rest = memoryview(data)
        with self._named():
            while rest:
                # A disk that is nearly full takes a part, and says why only at the next call.
                written = os.pwrite(self._descriptor, rest, offset)
                rest, offset = rest[written:], offset + written

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A fault of the disk's says in which file."""
        try:
            yield
        except OSError as error:
            error.filename = f"{self._path}"
            raise


def _make(place: TensorSpan) -> np.ndarray:
    tensor = place.later.make()
    found = LazyTensor(tuple(tensor.shape), tensor.dtype, place.later.make)
    assert found == place.later, f"{place.name}: promised {place.later}, made {found}"
    return digest.as_bytes(tensor)


@cache
def _crc_of_zeros(size: int) -> int:
    crc, zeros = 0, bytes(ZEROS)
    for start in range(0, size, ZEROS):
        crc = zlib.crc32(zeros[: size - start], crc)
    return crc
