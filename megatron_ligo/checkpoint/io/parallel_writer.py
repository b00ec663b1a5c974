"""Writes tensors to the disk in a few threads while the next ones are computed, and fsyncs them as it goes.

Hashing, copying and fsync release the GIL, so threads suffice. The bytes that wait to be written are bounded.
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
from megatron_ligo.checkpoint.io.file_layout import TensorSpan
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.common.atomic_files import fdatasync_descriptor, fsync_descriptor

WORKERS = 2
# The most bytes that wait in memory; a larger tensor waits alone.
WAITING_BYTES = 128 << 20
# A file is flushed each time this many bytes were written: a single fsync at its end would stall.
SYNC_BYTES = 256 << 20
# Small enough to be hashed and copied within the processor's cache. Writes of many MB took up to eight times as long
# if the kernel allocates memory of that size for them.
CHUNK = 1 << 19
ZEROS = 1 << 22


class ParallelWriter:
    """Takes tensors from one thread, writes them in others and records each digest in a journal.

    `finish` waits for all writes and raises their first error.
    """

    def __init__(self, journal: Journal, workers: int = WORKERS):
        self._journal = journal
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="write")
        self._room = Condition()
        self._waiting = 0
        self._jobs: list[Future] = []
        self._open_files: list[OpenFile] = []

    def put(self, file: OpenFile, span: TensorSpan) -> None:
        """Computes a tensor in this thread and queues its bytes. It is recorded once written, before the fsync."""
        size = span.tensor.nbytes
        with self._room:
            self._room.wait_for(lambda: not self._waiting or self._waiting + size <= WAITING_BYTES)
            self._waiting += size
        self._raise_failures()
        self._submit(self._write_span, file, span, _compute_bytes(span))

    def close(self, file: OpenFile) -> None:
        """Ends a file: it is fsynced and closed once all its tensors are written."""
        if file.leave():
            self._submit(self._close_file, file)

    def open(self, name: str, path: Path) -> OpenFile:
        """Opens a file to write into, until `close`, or until the writer ends."""
        file = OpenFile(name, path)
        self._open_files.append(file)
        return file

    def finish(self) -> None:
        """Waits until everything is on the disk."""
        self._pool.shutdown(wait=True)
        try:
            self._raise_failures()
        finally:
            self._discard_files()

    def abandon(self) -> None:
        """Drops the queued tensors, waits for those being written and closes all files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._discard_files()

    def _discard_files(self) -> None:
        for file in self._open_files:
            file.discard()
        self._open_files.clear()

    def _write_span(self, file: OpenFile, span: TensorSpan, data: np.ndarray) -> None:
        try:
            self._journal.add("wrote", file.name, span.name, value=file.write(span, data))
        finally:
            with self._room:
                self._waiting -= span.tensor.nbytes
                self._room.notify()
        if file.leave():
            self._close_file(file)

    def _close_file(self, file: OpenFile) -> None:
        file.close()
        # Appending and removing are atomic in CPython.
        self._open_files.remove(file)

    def _submit(self, job: Callable, *arguments: object) -> None:
        self._jobs.append(self._pool.submit(job, *arguments))

    def _raise_failures(self) -> None:
        finished = [job for job in self._jobs if job.done()]
        self._jobs = [job for job in self._jobs if job not in finished]
        for job in finished:
            job.result()


class OpenFile:
    """A file that several threads write into, each at its own offset. Its last user closes it."""

    def __init__(self, name: str, path: Path):
        self.name, self.path = name, path
        self._descriptor: int | None = os.open(path, os.O_RDWR)
        self._lock = Lock()
        self._users = 1
        self._unsynced = 0

    def enter(self) -> None:
        with self._lock:
            self._users += 1

    def leave(self) -> bool:
        """Ends one use. True if it was the last, whose owner closes the file."""
        with self._lock:
            self._users -= 1
            return self._users == 0

    def write(self, span: TensorSpan, data: np.ndarray) -> str:
        """Writes a tensor's bytes and checksums. Returns the digest of the bytes."""
        digest_state, crc = xxhash.xxh3_128(), 0
        for start in range(0, len(data), CHUNK):
            chunk = data[start : start + CHUNK]
            digest_state.update(chunk)
            crc = zlib.crc32(chunk, crc) if span.checksums else 0
            self._write(chunk, span.offset + start)
        self._write_checksums(span, crc)
        with self._lock:
            self._unsynced += len(data)
            needs_sync = self._unsynced >= SYNC_BYTES
            if needs_sync:
                self._unsynced = 0
        if needs_sync:
            with self._name_in_errors():
                fdatasync_descriptor(self._descriptor)
        return digest_state.hexdigest()

    def discard(self) -> None:
        """Closes the file of a failed job without flushing it. Does nothing if it is closed."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = None

    def leave_zeros(self, span: TensorSpan) -> None:
        """Leaves the span a hole; only an archive's checksums are written."""
        if span.checksums:
            self._write_checksums(span, _crc_of_zeros(span.tensor.nbytes))

    def close(self) -> None:
        try:
            with self._name_in_errors():
                fsync_descriptor(self._descriptor)
        finally:
            self.discard()

    def _write_checksums(self, span: TensorSpan, crc: int) -> None:
        for offset in span.checksums:
            self._write(struct.pack("<I", crc), offset)

    def _write(self, data: bytes | np.ndarray, offset: int) -> None:
        remaining = memoryview(data)
        with self._name_in_errors():
            while remaining:
                # A nearly full disk takes a part of the bytes, and reports the error only at the next call.
                written = os.pwrite(self._descriptor, remaining, offset)
                remaining, offset = remaining[written:], offset + written

    @contextmanager
    def _name_in_errors(self) -> Iterator[None]:
        """Adds the file's path to an OSError."""
        try:
            yield
        except OSError as error:
            error.filename = f"{self.path}"
            raise


def _compute_bytes(span: TensorSpan) -> np.ndarray:
    lazy = span.tensor
    tensor = lazy.make()
    expected, actual = (lazy.shape, lazy.dtype), (tuple(tensor.shape), tensor.dtype)
    assert actual == expected, f"{span.name}: expected {expected}, computed {actual}"
    return digest.as_bytes(tensor)


@cache
def _crc_of_zeros(size: int) -> int:
    crc, zeros = 0, bytes(ZEROS)
    for start in range(0, size, ZEROS):
        crc = zlib.crc32(zeros[: size - start], crc)
    return crc
