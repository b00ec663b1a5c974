"""Parses and tokenizes chunks of documents in worker processes; the results come in order."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

import numpy as np
import xxhash

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.raw_chunks import CHUNK_BYTES, RawChunk, parse_chunk
from megatron_ligo.data.corpus.split_writer import token_dtype
from megatron_ligo.data.corpus.window_encoding import encode_text
from megatron_ligo.data.tokenizer import Tokenizer

# Chunks that wait for a worker or for their turn, in all; a single larger one is let through.
MAX_WAITING_BYTES = 64 << 20
CHUNKS_PER_WORKER = 4
ENCODER_FILE = ".encoder"


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes chunks; picklable, as each worker reads one."""

    tokenizer: Tokenizer
    json_key: str
    valid_fraction: float

    def encode(self, chunks: list[RawChunk]) -> EncodedChunks:
        ids, lengths, sizes, held_out = array("i"), [], [], []
        problems = []
        for chunk in chunks:
            parsed = parse_chunk(chunk, self.json_key)
            problems += [(chunk.path, problem) for problem in parsed.problems]
            for text, data in zip(parsed.texts, parsed.encoded, strict=True):
                before = len(ids)
                encoded = encode_text(self.tokenizer, text)
                if encoded.size:
                    ids.frombytes(encoded.tobytes())
                    ids.append(self.tokenizer.eod)
                lengths.append(len(ids) - before)
                sizes.append(len(data))
                held_out.append(is_held_out(data, self.valid_fraction))
        return EncodedChunks(
            np.array(ids, token_dtype(self.tokenizer.vocab_size)),
            np.array(lengths, np.int32), np.array(sizes, np.int64), np.array(held_out, bool), problems,
        )  # fmt: skip


@dataclass(frozen=True)
class EncodedChunks:
    """The documents of some chunks.

    ids: (tokens,), each document with its end token. lengths, sizes, held_out: (documents,) tokens, UTF-8 bytes and
    the split. A document without tokens has no end token either. problems: (path, problem) of each bad record.
    """

    ids: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray
    held_out: np.ndarray
    problems: list[tuple[str, Problem]]


def is_held_out(data: bytes, fraction: float) -> bool:
    """True for documents of the validation split, a fraction of all; equal texts fall into the same split."""
    return xxhash.xxh3_64_intdigest(data) < fraction * 2**64


def group_chunks(chunks: Iterator[RawChunk]) -> Iterator[list[RawChunk]]:
    """Yields lists of chunks of about CHUNK_BYTES, because many files are small."""
    group, size = [], 0
    for chunk in chunks:
        group.append(chunk)
        size += chunk.size
        if size >= CHUNK_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


class EncodingPool:
    """Encodes a source's chunks, in order. `waiting` holds the chunks after those that were yielded last.

    scratch: a folder for a file that the workers read.
    """

    def __init__(self, encoder: ChunkEncoder, chunks: Iterator[RawChunk], workers: int, scratch: Path):
        self.encoder, self.file = encoder, scratch / ENCODER_FILE
        self.groups = group_chunks(chunks)
        self.workers = workers
        self.waiting: deque[tuple[list[RawChunk], Future]] = deque()

    def __iter__(self) -> Iterator[tuple[RawChunk, EncodedChunks]]:
        """Yields (the last chunk of a group, the group's documents)."""
        if self.workers <= 1:
            for group in self.groups:
                yield group[-1], self.encoder.encode(group)
            return
        # By a file: the pipe to a new process holds 64 KiB, and this process would wait for ever to write more of a
        # tokenizer to a worker that is killed before it reads.
        self.file.write_bytes(pickle.dumps(self.encoder))
        # Spawned, because this process has threads and must not be forked.
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_init_worker, initargs=(self.file,))
        try:
            with _interrupts_held_back():
                self._fill(pool)
            while self.waiting:
                group, future = self.waiting.popleft()
                yield group[-1], future.result()
                self._fill(pool)
        except BrokenProcessPool as error:
            hint = "It may have run out of memory: use fewer --workers."
            raise DataError(Problem("a tokenizer worker", "token ids", "an abrupt exit", hint)) from error
        finally:
            pool.shutdown(cancel_futures=True)
            self.file.unlink()

    def _fill(self, pool: ProcessPoolExecutor) -> None:
        size = sum(chunk.size for group, _ in self.waiting for chunk in group)
        while len(self.waiting) < CHUNKS_PER_WORKER * self.workers and size < MAX_WAITING_BYTES:
            group = next(self.groups, None)
            if group is None:
                return
            self.waiting.append((group, pool.submit(_encode_in_worker, group)))
            size += sum(chunk.size for chunk in group)

    def unread_chunks(self) -> Iterator[RawChunk]:
        """Yields the chunks after those that were yielded last, undecoded."""
        for group, _ in self.waiting:
            yield from group
        for group in self.groups:
            yield from group


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Blocks SIGINT here and in the processes that start meanwhile: one that is interrupted as it starts prints a
    traceback of its own."""
    signals = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _init_worker(file: Path) -> None:
    global _worker_encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # An interrupt reaches every process of the terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The library's threads would oversubscribe the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = pickle.loads(file.read_bytes())


def _end_with_parent() -> None:
    """Waits for the process that started this worker, which would wait for its next task for ever, and ends."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _encode_in_worker(chunks: list[RawChunk]) -> EncodedChunks:
    return _worker_encoder.encode(chunks)
