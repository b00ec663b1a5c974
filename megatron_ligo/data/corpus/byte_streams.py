"""Reads plain, gzip and Zstandard files in blocks, so that a file of any size takes the same memory."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.raw_chunks import CHUNK_BYTES

COMPRESSIONS = (".gz", ".zst")


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields blocks of a file's content, decompressed, with the bytes of the file read so far.

    DataError if a compressed file is truncated or damaged.
    """
    if path.suffix in COMPRESSIONS and not path.stat().st_size:
        raise _damaged(path, "an empty file")
    with path.open("rb") as raw:
        stream = _decompress(path, raw)
        while True:
            try:
                block = stream.read(CHUNK_BYTES)
            except (EOFError, OSError, zlib.error) as error:
                # Errors of the disk have a number, those of the format none.
                if isinstance(error, OSError) and error.errno:
                    raise
                raise _damaged(path, str(error)) from None
            if not block:
                return
            yield block, raw.tell()


def read_head(path: Path, size: int) -> bytes:
    """Returns the first `size` bytes of a file's content, or all of a shorter one."""
    head = bytearray()
    for block, _ in read_blocks(path):
        head += block
        if len(head) >= size:
            break
    return bytes(head[:size])


def _decompress(path: Path, raw: BinaryIO) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        pyarrow = import_pyarrow(path)
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return raw


def _damaged(path: Path, found: str) -> DataError:
    hint = "It is truncated or damaged: copy it again."
    if "too much memory" in found:
        hint = "Compress it again without --long: its window does not fit a bounded memory."
    return DataError(Problem(str(path), f"a complete {path.suffix} file", found, hint))


def import_pyarrow(path: Path) -> ModuleType:
    """Imports pyarrow, for the file `path`. DataError if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        hint = "pip install pyarrow, at the version of requirements.txt."
        raise DataError(Problem(str(path), f"the package pyarrow, which reads {path.suffix}", error, hint)) from None
    return pyarrow
