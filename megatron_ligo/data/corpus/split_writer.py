"""Writes one split as Megatron-core's IndexedDatasetBuilder does, byte for byte, in a memory that does not grow.

The builder keeps Python lists of lengths and offsets: about 120 bytes for each document.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megatron_ligo.data.indexed_dataset import HEADER, MAGIC, TOKEN_TYPES, VERSION, digest_file
from megatron_ligo.data.tokenizer import Tokenizer

# Megatron-core stores the ids of a smaller vocabulary in 16 bits.
MIN_WIDE_VOCABULARY = 65500
BLOCK_DOCUMENTS = 1 << 20


def token_dtype(vocab_size: int) -> type:
    """Returns Megatron-core's numpy type for the ids of a vocabulary."""
    return np.uint16 if vocab_size < MIN_WIDE_VOCABULARY else np.int32


class SplitWriter:
    """Writes one split: documents, each with its end token, to PREFIX.bin and .idx, and the record PREFIX.json."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer):
        self.prefix = prefix
        self.tokenizer = tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.bin_file = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 (closed by `close`)
        # The documents' lengths, int32, until they go into the index.
        self.lengths_path = Path(f"{prefix}.lengths")
        self.lengths_file = self.lengths_path.open("wb")
        self.documents = self.tokens = self.text_bytes = self.max_token = self.empty_documents = 0

    def add(self, ids: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Adds documents. ids: (tokens,) of all of them, with end tokens. lengths: (documents,); 0 is an empty one.

        text_bytes: the UTF-8 bytes of their texts.
        """
        filled = lengths[lengths > 0]
        self.empty_documents += len(lengths) - len(filled)
        self.documents += len(filled)
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self.max_token = max(self.max_token, int(ids.max(initial=0)))
        self.bin_file.write(ids.astype(self.dtype).tobytes())
        self.lengths_file.write(filled.astype(np.int32).tobytes())

    def finish(self) -> dict:
        """Writes the index and the record; returns the record."""
        self.close()
        self._write_index(Path(f"{self.prefix}.idx"))
        self.lengths_path.unlink()
        record = {
            "documents": self.documents,
            "empty_documents_left_out": self.empty_documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "max_token": self.max_token,
            "vocab_size": self.tokenizer.vocab_size,
            "eod": self.tokenizer.eod,
            "tokenizer": self.tokenizer.digest,
            "dtype": np.dtype(self.dtype).name,
            "bin_bytes": self.tokens * np.dtype(self.dtype).itemsize,
            "idx_digest": digest_file(f"{self.prefix}.idx"),
        }
        Path(f"{self.prefix}.json").write_text(json.dumps(record, indent=2))
        return record

    def close(self) -> None:
        self.bin_file.close()
        self.lengths_file.close()

    def _write_index(self, path: Path) -> None:
        """Writes the header, each document's length (int32) and offset in bytes (int64), and their boundaries (int64).

        Each document is one sequence.
        """
        code = next(code for code, dtype in TOKEN_TYPES.items() if dtype is self.dtype)
        itemsize = np.dtype(self.dtype).itemsize
        starts = range(0, self.documents, BLOCK_DOCUMENTS)
        lengths = np.memmap(self.lengths_path, np.int32, "r") if self.documents else np.empty(0, np.int32)
        with path.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, VERSION, code, self.documents, self.documents + 1))
            for start in starts:
                stream.write(lengths[start : start + BLOCK_DOCUMENTS].tobytes())
            offset = 0
            for start in starts:
                sizes = lengths[start : start + BLOCK_DOCUMENTS].astype(np.int64) * itemsize
                ends = offset + np.cumsum(sizes)
                stream.write((ends - sizes).tobytes())
                offset = int(ends[-1])
            for start in range(0, self.documents + 1, BLOCK_DOCUMENTS):
                stop = min(start + BLOCK_DOCUMENTS, self.documents + 1)
                stream.write(np.arange(start, stop, dtype=np.int64).tobytes())
