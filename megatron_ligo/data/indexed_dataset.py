"""Megatron-core's indexed datasets (PREFIX.bin, PREFIX.idx) as files: are they whole, and what do they hold?

Beside a pair that `prepare_data` made lies PREFIX.json, its record: the largest token id, the tokenizer's digest.
A pair without a record works too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ErrorCollector

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
# Megatron-core's codes of the integer types; it has two codes of real numbers, which are no tokens.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class IndexedFiles:
    """A whole .bin/.idx pair. `record` is PREFIX.json's table, or None where there is no such file."""

    prefix: str
    dtype: type
    documents: int
    tokens: int
    idx_digest: str
    record: dict | None

    @property
    def bin_bytes(self) -> int:
        return self.tokens * np.dtype(self.dtype).itemsize

    def token_range(self) -> tuple[int, int]:
        """(smallest, largest) token id; reads the whole .bin."""
        tokens = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")
        return int(tokens.min()), int(tokens.max())


def digest_file(path: str | Path) -> str:
    """xxh3-64 of a file's bytes, in hex."""
    hasher = xxhash.xxh3_64()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def open_indexed_files(prefix: str, errors: ErrorCollector) -> IndexedFiles | None:
    """The pair at a prefix; faults are added and None returned if it is missing or not whole."""
    prefix = str(Path(prefix).resolve())
    paths = [Path(f"{prefix}.{kind}") for kind in ("bin", "idx")]
    missing = [path for path in paths if not path.is_file()]
    for path in missing:
        hint = "Give the prefix without .bin or .idx." if path.stem.endswith((".bin", ".idx")) else "Check the prefix."
        errors.add(str(path), "a file", "none", hint)
    if missing:
        return None
    count = len(errors.problems)
    found = _read_index(paths[1], paths[0].stat().st_size, errors)
    if found is None:
        return None
    dtype, documents, tokens = found
    digest = digest_file(paths[1])
    record = _read_record(Path(f"{prefix}.json"), digest, paths[0].stat().st_size, errors)
    return IndexedFiles(prefix, dtype, documents, tokens, digest, record) if len(errors.problems) == count else None


def _read_index(path: Path, bin_bytes: int, errors: ErrorCollector) -> tuple[type, int, int] | None:
    """(token type, documents, tokens) of an .idx file that agrees with its .bin's size."""
    size = path.stat().st_size
    if size < HEADER.size:
        errors.add(str(path), f"at least {HEADER.size} bytes", size, "The file is cut: copy or make it again.")
        return None
    with path.open("rb") as stream:
        magic, version, code, sequences, boundaries = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC or version != VERSION:
        errors.add(str(path), "a Megatron-core index, version 1", f"{magic!r}, version {version}")
        return None
    if code not in TOKEN_TYPES:
        errors.add(str(path), f"a whole-number token type, one of {sorted(TOKEN_TYPES)}", f"code {code}")
        return None
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected, expected + sequences):
        what = f"{expected} bytes for {sequences} sequences and {boundaries} document ends"
        errors.add(str(path), what, size, "The file is cut or damaged: copy or make it again.")
        return None
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size, shape=expected - HEADER.size)
    lengths, pointers, ends = _split_columns(raw, sequences)
    dtype = TOKEN_TYPES[code]
    problem = _find_inconsistency(lengths, pointers, ends, np.dtype(dtype).itemsize, bin_bytes)
    if problem:
        errors.add(f"{path.with_suffix('.bin')}", *problem, "One of the two files is cut, damaged or of another pair.")
        return None
    return dtype, boundaries - 1, int(lengths.sum(dtype=np.int64))


def _split_columns(raw: np.ndarray, sequences: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths = raw[: 4 * sequences].view(np.int32)
    # The offsets lie at any byte: a copy aligns them.
    pointers = np.frombuffer(raw[4 * sequences : 12 * sequences].tobytes(), dtype=np.int64)
    ends = np.frombuffer(raw[12 * sequences :].tobytes(), dtype=np.int64)
    return lengths, pointers, ends


def _find_inconsistency(lengths, pointers, ends, itemsize: int, bin_bytes: int) -> tuple[object, object] | None:
    """(expected, found) of the first thing in which the index contradicts itself or its .bin, or None."""
    sequences = len(lengths)
    if sequences == 0:
        return "at least one sequence in the index", "none"
    if lengths.min() < 0:
        return "no negative length in the index", int(lengths.min())
    total = int(lengths.sum(dtype=np.int64)) * itemsize
    if total != bin_bytes:
        return f"{total} bytes by its index", bin_bytes
    # Compared as they are: sums and differences of such numbers may not fit.
    beyond = pointers > bin_bytes - lengths.astype(np.int64) * itemsize
    if pointers.min() < 0 or beyond.any():
        found = int(pointers[beyond.argmax()] if beyond.any() else pointers.min())
        return f"sequences within its {bin_bytes} bytes", f"one from byte {found} on"
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != sequences or (ends[1:] < ends[:-1]).any():
        return f"document ends that rise from 0 to {sequences}", f"{ends[:3].tolist()} ... {ends[-1:].tolist()}"
    return None


def _read_record(path: Path, idx_digest: str, bin_bytes: int, errors: ErrorCollector) -> dict | None:
    if not path.is_file():
        return None
    hint = "Prepare the data again, or remove this file if the pair was made otherwise."
    try:
        record = read_json(path)
        ours = (record["idx_digest"], record["bin_bytes"], int(record["max_token"]), str(record["tokenizer"]))
    except (ValueError, KeyError, TypeError) as error:
        errors.add(str(path), "the record of a prepared pair", f"{type(error).__name__}: {error}", hint)
        return None
    if ours[:2] != (idx_digest, bin_bytes):
        errors.add(str(path), f"the record of this pair (.idx digest {idx_digest}, .bin {bin_bytes} bytes)", ours, hint)
        return None
    return record
