"""Digests (xxh3, 128 bits) of files, bytes and JSON values. They detect damage and changes, not an attacker.

The digest of a file of at most PART bytes is that of its content; of a larger file, that of its parts' digests, so that
several ranks can compute it together. A sampled digest covers the size, the first and last block, and blocks between
them at fixed distances.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import xxhash

CHUNK = 1 << 22
# Small enough to stay in the processor's cache.
ZEROS = memoryview(bytes(1 << 18))
PART = 1 << 26
SAMPLE_BLOCK = 1 << 16
SAMPLE_BLOCKS = 4096
# A file that changed less than this before it was read may change again without a new time.
SETTLED_NS = 2_000_000_000
SEAL = "record_digest"
SIDECAR_SUFFIX = ".digest"

FilePart = tuple[int, int]  # offset and size, in bytes
# The one hidden file that is part of a checkpoint: torch's distributed checkpoints (Megatron-core's) begin there.
DCP_METADATA = ".metadata"


def hash_bytes(data: object) -> str:
    """Returns the digest of bytes, or of any object with the buffer interface."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_json(value: object) -> str:
    """Returns the digest of a JSON value, whatever the order of its keys."""
    return hash_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def hash_file_part(path: Path, offset: int, size: int) -> str | None:
    """Returns the digest of `size` bytes of a file from `offset`; None if it has fewer.

    A hole is not read: it is zeros.
    """
    state = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(CHUNK, max(size, 1))))
    with path.open("rb", buffering=0) as file:
        end = offset + size
        if os.fstat(file.fileno()).st_size < end:
            return None
        while offset < end:
            data = _next_data(file.fileno(), offset, end)
            _hash_zeros(state, data - offset)
            offset = _end_of_data(file.fileno(), data, end)
            file.seek(data)
            while data < offset:
                count = file.readinto(buffer[: min(len(buffer), offset - data)])
                if not count:
                    return None
                state.update(buffer[:count])
                data += count
    return state.hexdigest()


def _next_data(descriptor: int, offset: int, end: int) -> int:
    """Returns where the next bytes of a file that are no hole begin, or `end`."""
    try:
        return min(os.lseek(descriptor, offset, os.SEEK_DATA), end)
    except OSError as error:
        # ENXIO: a hole to the end of the file. Else a file system without holes.
        return end if error.errno == errno.ENXIO else offset


def _end_of_data(descriptor: int, offset: int, end: int) -> int:
    try:
        return min(os.lseek(descriptor, offset, os.SEEK_HOLE), end) if offset < end else end
    except OSError:
        return end


def _hash_zeros(state: xxhash.xxh3_128, size: int) -> None:
    for start in range(0, size, len(ZEROS)):
        state.update(ZEROS[: size - start])


def list_parts(size: int, sampled: bool) -> list[FilePart]:
    """Returns the parts of a file of `size` bytes that its digest covers."""
    if not sampled or size <= SAMPLE_BLOCK * SAMPLE_BLOCKS:
        return [(offset, min(PART, size - offset)) for offset in range(0, size, PART)] or [(0, 0)]
    last = size - SAMPLE_BLOCK
    return [(last * number // (SAMPLE_BLOCKS - 1), SAMPLE_BLOCK) for number in range(SAMPLE_BLOCKS)]


def join_digests(size: int, digests: Sequence[str]) -> str:
    """Returns the digest of a file of `size` bytes from its parts' digests."""
    return digests[0] if len(digests) == 1 else hash_bytes("\n".join([f"{size}", *digests]).encode())


def digest_file(path: Path) -> str:
    """Returns the digest of a whole file."""
    size = path.stat().st_size
    parts = [hash_file_part(path, *part) for part in list_parts(size, sampled=False)]
    return join_digests(size, [f"{part}" for part in parts])


def stamp_file(path: Path) -> list[int]:
    """Returns what changes whenever a file is changed: size, times of content and entry (ns), and inode."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def is_settled(stamp: Sequence[int]) -> bool:
    """True if the file of that stamp has not changed for so long that its next change will have another time."""
    return stamp[2] + SETTLED_NS < time.time_ns()


def is_sidecar(path: Path) -> bool:
    """True for the hidden files that keep digests beside what they describe."""
    return path.name.startswith(".") and path.suffix == SIDECAR_SUFFIX


def list_files(path: Path) -> list[Path]:
    """Returns a file itself, or every file below a folder but hidden ones, such as locks and kept digests, sorted."""
    if not path.is_dir():
        return [path]
    files: list[Path] = []
    for folder, _, names in os.walk(path):
        files += [Path(folder, name) for name in names if not name.startswith(".") or name == DCP_METADATA]
    return sorted(file for file in files if file.is_file())


def seal(record: dict) -> dict:
    """Returns a JSON record with the digest of all its other keys."""
    plain = json.loads(json.dumps({key: value for key, value in record.items() if key != SEAL}))
    return {**plain, SEAL: hash_json(plain)}


def is_intact(record: dict) -> bool:
    """True if a record that was read still has the content that `seal` saw."""
    return record.get(SEAL) == hash_json({key: value for key, value in record.items() if key != SEAL})
