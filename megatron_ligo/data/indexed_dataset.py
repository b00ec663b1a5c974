"""Validates Megatron-core's indexed datasets (PREFIX.bin, PREFIX.idx) and reads their counts.

A pair made by `ligo prepare` has a record, PREFIX.json, with its largest token id and its tokenizer's digest.
The record is optional.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.common.hub_models import explain_missing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, token type, sequences, document boundaries
# Megatron-core's codes of the integer types. Its two floating-point codes are not valid for tokens.
TOKEN_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


@dataclass(frozen=True)
class IndexedFiles:
    """A validated .bin/.idx pair. record: the content of PREFIX.json, or None without that file."""

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
        """Returns the smallest and largest token id; reads the whole .bin file."""
        tokens = np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r")
        return int(tokens.min()), int(tokens.max())


def digest_file(path: str | Path) -> str:
    """Returns the xxh3-64 (hex) of a file's content."""
    hasher = xxhash.xxh3_64()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 24):
            hasher.update(block)
    return hasher.hexdigest()


def _prefix_hint(prefix: str) -> str:
    """Returns what to do about a prefix without a pair of files."""
    if prefix.endswith((".bin", ".idx")):
        return "Give the prefix without .bin or .idx."
    if Path(prefix).is_file():
        return "Make data of the text first: ligo prepare."
    names = sorted(path.with_suffix("").name for path in Path(prefix).glob("*.idx"))
    if names:
        return f"Give a prefix in that folder: {', '.join(names[:3])}."
    return explain_missing(prefix, ".idx") or "Check the prefix."


def open_indexed_files(prefix: str, errors: ErrorCollector) -> IndexedFiles | None:
    """Validates the pair at a prefix. If it is missing or inconsistent, adds errors and returns None."""
    prefix = str(Path(prefix).resolve())
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    for path in missing:
        hint = _prefix_hint(prefix)
        errors.add(str(path), "a file", "none", hint)
    if missing:
        return None
    error_count = len(errors.problems)
    index = _read_index(idx_path, bin_path.stat().st_size, errors)
    if index is None:
        return None
    dtype, documents, tokens = index
    digest = digest_file(idx_path)
    record = _read_record(Path(f"{prefix}.json"), digest, bin_path.stat().st_size, errors)
    if len(errors.problems) > error_count:
        return None
    return IndexedFiles(prefix, dtype, documents, tokens, digest, record)


def _read_index(path: Path, bin_bytes: int, errors: ErrorCollector) -> tuple[type, int, int] | None:
    """Returns (token type, documents, tokens) of an .idx file that is consistent with its .bin's size."""
    size = path.stat().st_size
    if size < HEADER.size:
        errors.add(str(path), f"at least {HEADER.size} bytes", size, "The file is truncated: copy or prepare it again.")
        return None
    with path.open("rb") as stream:
        magic, version, code, sequences, boundaries = HEADER.unpack(stream.read(HEADER.size))
    if magic != MAGIC or version != VERSION:
        errors.add(str(path), f"a Megatron-core index, version {VERSION}", f"{magic!r}, version {version}")
        return None
    if code not in TOKEN_TYPES:
        errors.add(str(path), f"the code of an integer token type, one of {sorted(TOKEN_TYPES)}", f"code {code}")
        return None
    expected_size = HEADER.size + 12 * sequences + 8 * boundaries
    if size not in (expected_size, expected_size + sequences):  # an optional byte per sequence: its mode
        expected = f"{expected_size} bytes for {sequences} sequences and {boundaries} document boundaries"
        errors.add(str(path), expected, size, "The file is truncated or damaged: copy or prepare it again.")
        return None
    raw = np.memmap(path, dtype=np.uint8, mode="r", offset=HEADER.size, shape=expected_size - HEADER.size)
    lengths, pointers, ends = _split_columns(raw, sequences)
    dtype = TOKEN_TYPES[code]
    inconsistency = _find_inconsistency(lengths, pointers, ends, np.dtype(dtype).itemsize, bin_bytes)
    if inconsistency:
        hint = "One of the two files is truncated, damaged or from another pair."
        errors.add(f"{path.with_suffix('.bin')}", *inconsistency, hint)
        return None
    return dtype, boundaries - 1, int(lengths.sum(dtype=np.int64))


def _split_columns(raw: np.ndarray, sequences: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits the index into sequence lengths (int32), byte offsets in the .bin and document ends (int64)."""
    lengths = raw[: 4 * sequences].view(np.int32)
    # The offsets may be unaligned: a copy aligns them.
    pointers = np.frombuffer(raw[4 * sequences : 12 * sequences].tobytes(), dtype=np.int64)
    ends = np.frombuffer(raw[12 * sequences :].tobytes(), dtype=np.int64)
    return lengths, pointers, ends


def _find_inconsistency(
    lengths: np.ndarray, pointers: np.ndarray, ends: np.ndarray, itemsize: int, bin_bytes: int
) -> tuple[object, object] | None:
    """Returns (expected, found) of the first contradiction within the index or with its .bin, or None."""
    sequences = len(lengths)
    if sequences == 0:
        return "at least one sequence in the index", "none"
    if lengths.min() < 0:
        return "no negative length in the index", int(lengths.min())
    total = int(lengths.sum(dtype=np.int64)) * itemsize
    if total != bin_bytes:
        return f"{total} bytes according to its index", bin_bytes
    # The offsets are arbitrary: their sum with a length may overflow, this difference cannot.
    out_of_range = pointers > bin_bytes - lengths.astype(np.int64) * itemsize
    if pointers.min() < 0 or out_of_range.any():
        offset = int(pointers[out_of_range.argmax()] if out_of_range.any() else pointers.min())
        return f"sequences within its {bin_bytes} bytes", f"one at byte {offset}"
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != sequences or (ends[1:] < ends[:-1]).any():
        return f"document ends that rise from 0 to {sequences}", f"{ends[:3].tolist()} ... {ends[-1:].tolist()}"
    return None


def _read_record(path: Path, idx_digest: str, bin_bytes: int, errors: ErrorCollector) -> dict | None:
    if not path.is_file():
        return None
    hint = "Prepare the data again, or remove this file if the pair has another origin."
    try:
        record = read_json(path)
        values = (record["idx_digest"], record["bin_bytes"])
        if type(record["max_token"]) is not int or not isinstance(record["tokenizer"], str):
            raise ValueError("max_token is no integer, or tokenizer no text")
    except (ValueError, KeyError, TypeError) as error:
        errors.add(str(path), "the record of a prepared pair", f"{type(error).__name__}: {error}", hint)
        return None
    if values != (idx_digest, bin_bytes):
        expected = f"the record of this pair (.idx digest {idx_digest}, .bin {bin_bytes} bytes)"
        errors.add(str(path), expected, values, hint)
        return None
    return record
