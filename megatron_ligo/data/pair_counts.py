"""Counts of neighbouring tokens in indexed data, by threads, in a bounded memory.

Pairs are counted across the ends of documents, as training reads them. Legend: V tokens, n distinct pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.indexed_dataset import IndexedFiles
from megatron_ligo.growth.codes.spectral_codes import PairCounts

log = logging.getLogger(__name__)

CHUNK_TOKENS = 1 << 20
# Above this number of distinct pairs, those that were seen once so far are dropped.
MAX_PAIRS = 24_000_000

Counts = tuple[np.ndarray, np.ndarray]  # first * V + second, sorted int64; counts, int64


def count_pairs(
    files: Sequence[IndexedFiles], vocab_size: int, max_tokens: int, threads: int, max_pairs: int = MAX_PAIRS
) -> tuple[PairCounts, int]:
    """Counts the pairs of neighbouring tokens of all files, or of chunks spread evenly over them.

    max_tokens: the most tokens to read; 0: all. Returns the counts and the number of tokens read. DataError for a token
    outside the vocabulary.
    """
    chunks = list(_choose_chunks(files, max_tokens))
    pending: list[Counts] = []
    limit = max_pairs
    # Sorting, which is the work, runs outside the interpreter's lock. A few chunks at a time bound the memory.
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(chunks), threads):
            pending += pool.map(lambda chunk: _count_chunk(*chunk, vocab_size), chunks[at : at + threads])
            if sum(len(keys) for keys, _ in pending) > limit:
                pending = [_bounded(_merge(pending), max_pairs)]
                limit = len(pending[0][0]) + max_pairs
    keys, counts = _merge(pending)
    first, second = np.divmod(keys, vocab_size)
    pairs = PairCounts(*(torch.from_numpy(part) for part in (first, second, counts.astype(np.float64))), vocab_size)
    return pairs, sum(stop - start for _, start, stop in chunks)


def _choose_chunks(files: Sequence[IndexedFiles], max_tokens: int) -> Iterator[tuple[IndexedFiles, int, int]]:
    """Yields (file, first token, end) of the chunks to read."""
    chunks = [
        (file, start, min(start + CHUNK_TOKENS, file.tokens))
        for file in files
        for start in range(0, file.tokens, CHUNK_TOKENS)
    ]
    wanted = len(chunks) if not max_tokens else min(len(chunks), max(1, max_tokens // CHUNK_TOKENS))
    for i in range(wanted):
        file, start, stop = chunks[i * len(chunks) // wanted]
        yield file, start, min(stop, start + max_tokens) if max_tokens else stop


def _count_chunk(file: IndexedFiles, start: int, stop: int, vocab_size: int) -> Counts:
    """Counts the pairs that begin in a chunk of a file."""
    stored = np.memmap(f"{file.prefix}.bin", dtype=file.dtype, mode="r")
    tokens = stored[start : min(stop + 1, file.tokens)].astype(np.int64)
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        bad = int(tokens.max()) if int(tokens.min()) >= 0 else int(tokens.min())
        raise DataError(Problem(f"{file.prefix}.bin", f"token ids from 0 to {vocab_size - 1} (the model's)", bad))
    return np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)


def _merge(parts: Sequence[Counts]) -> Counts:
    """Sums the counts of equal pairs."""
    keys, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, int)
    return keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts


def _bounded(counted: Counts, max_pairs: int) -> Counts:
    keys, counts = counted
    if len(keys) <= max_pairs:
        return counted
    keep = counts > 1
    log.warning("%d distinct pairs: the %d seen once so far are dropped", len(keys), len(keys) - int(keep.sum()))
    return keys[keep], counts[keep]
