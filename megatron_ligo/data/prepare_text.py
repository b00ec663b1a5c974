"""Tokenizes text in parallel into Megatron-core's indexed datasets; the same input gives the same bytes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ligo.common.atomic_files import fsync_tree, read_json, write_json
from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.common.folder_kinds import DATA, check_output
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.indexed_dataset import digest_file
from megatron_ligo.data.tokenizer import Tokenizer, digest_tokenizer, load_tokenizer, train_sentencepiece

log = logging.getLogger(__name__)

RECORD_NAME = "prepared.json"
STAGING_NAME = ".preparing"
# sentencepiece is trained on this much of the training split.
TOKENIZER_TRAINING_BYTES = 16 << 20
CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class TextRecipe:
    """The texts, the tokenizer and the split of a data set to prepare.

    tokenizer: path of an existing tokenizer. train_vocab: size of a new one to train, if `tokenizer` is empty.
    valid_fraction: share of the documents to hold out.
    """

    texts: DocumentSource
    tokenizer: str = ""
    train_vocab: int = 0
    eod: str = ""
    valid_fraction: float = 0.05

    def fingerprint(self) -> list:
        """Returns everything that the result depends on, as JSON values."""
        tokenizer = digest_tokenizer(self.tokenizer) if self.tokenizer else ""
        return [self.texts.fingerprint(), tokenizer, self.train_vocab, self.eod, self.valid_fraction]


def prepare_text(recipe: TextRecipe, output: Path, workers: int) -> dict:
    """Writes OUTPUT/train and OUTPUT/valid (.bin, .idx, .json) and OUTPUT/tokenizer; returns both splits' records.

    Documents are held out by a hash of their text, so that equal documents fall into the same split. Files are built
    in a staging folder and renamed, OUTPUT/prepared.json last. If it exists with the same fingerprint, nothing is done.
    """
    fingerprint = json.loads(json.dumps(recipe.fingerprint()))
    check_output(output, DATA)
    staging = output / STAGING_NAME
    with exclusive_access(output):
        if (staging / RECORD_NAME).is_file():
            # A complete result: its run was killed while publishing it.
            _publish(staging, output)
        earlier = _read_earlier_result(output, fingerprint)
        if earlier:
            return earlier
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        try:
            tokenizer = _prepare_tokenizer(recipe, staging / "tokenizer")
            splits = _write_splits(recipe, tokenizer, staging, workers)
            fsync_tree(staging)
            write_json(staging / RECORD_NAME, {"fingerprint": fingerprint, "splits": splits})
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        _publish(staging, output)
    return splits


def _read_earlier_result(output: Path, fingerprint: list) -> dict | None:
    """Returns the records of an earlier run of the same recipe. DataError if other data are in the folder."""
    path = output / RECORD_NAME
    if path.is_file():
        try:
            record = read_json(path)
            earlier_fingerprint, splits = record["fingerprint"], record["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(Problem(f"{path}", "the record of prepared data", f"{error!r}")) from None
        if earlier_fingerprint == fingerprint:
            log.info("%s is up to date: it was prepared from the same texts and tokenizer.", output)
            return splits
    present = sorted(path.name for path in output.glob("*") if path.stem in ("train", "valid", "tokenizer", "prepared"))
    if present:
        hint = "Choose another --output, or remove them."
        raise DataError(Problem(str(output), "no data, or data from the same texts and tokenizer", present, hint))
    return None


def _prepare_tokenizer(recipe: TextRecipe, folder: Path) -> Tokenizer:
    """Copies or trains the tokenizer into a new folder and loads it."""
    folder.mkdir()
    if not recipe.train_vocab:
        tokenizer = load_tokenizer(recipe.tokenizer, recipe.eod)
        for path in tokenizer.files:
            shutil.copyfile(path, folder / path.name)
        return tokenizer
    train_sentencepiece(_sample_training_texts(recipe), recipe.train_vocab, folder)
    return load_tokenizer(folder, recipe.eod)


def _sample_training_texts(recipe: TextRecipe) -> Iterator[str]:
    """Yields the first documents of the training split, about TOKENIZER_TRAINING_BYTES of them."""
    total = 0
    for text in recipe.texts:
        if not _is_held_out(text, recipe.valid_fraction):
            yield text
            total += len(text.encode())
        if total > TOKENIZER_TRAINING_BYTES:
            return


def _is_held_out(text: str, fraction: float) -> bool:
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def _write_splits(recipe: TextRecipe, tokenizer: Tokenizer, staging: Path, workers: int) -> dict:
    names = ("train", "valid") if recipe.valid_fraction else ("train",)
    writers = {name: SplitWriter(staging / name, tokenizer) for name in names}
    console = Console(stderr=True)
    columns = (TextColumn("tokens"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=recipe.texts.total_bytes())
        for texts, encoded_texts in _encode_chunks(recipe, tokenizer, staging / "tokenizer", workers):
            for text, ids in zip(texts, encoded_texts, strict=True):
                name = "valid" if _is_held_out(text, recipe.valid_fraction) else "train"
                writers[name].add(text, ids)
                bar.advance(task, len(text.encode()))
    for name, writer in writers.items():
        if not writer.documents:
            hint = "Provide more text, or set --valid-fraction."
            raise DataError(Problem(f"the {name} split", "at least one document", "none", hint))
    return {name: writer.finish() for name, writer in writers.items()}


def _encode_chunks(recipe: TextRecipe, tokenizer: Tokenizer, folder: Path, workers: int) -> Iterator[tuple[list, list]]:
    """Yields (texts, their token ids) per chunk, in order. A few chunks per worker are in flight."""
    if workers <= 1:
        for texts in _split_into_chunks(recipe.texts):
            yield texts, [np.array(tokenizer.encode(text), dtype=np.int32) for text in texts]
        return
    # Spawned, because this process has threads and must not be forked.
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_init_worker, initargs=(str(folder), recipe.eod)
    )
    chunks = _split_into_chunks(recipe.texts)
    try:
        pending = deque((texts, pool.submit(_encode_chunk, texts)) for texts in islice(chunks, 4 * workers))
        while pending:
            texts, future = pending.popleft()
            yield texts, future.result()
            pending.extend((texts, pool.submit(_encode_chunk, texts)) for texts in islice(chunks, 1))
    except BrokenProcessPool as error:
        hint = "It may have run out of memory: use fewer --workers."
        raise DataError(Problem("a tokenizer worker", "token ids", "an abrupt exit", hint)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _split_into_chunks(texts: DocumentSource) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _init_worker(folder: str, eod: str) -> None:
    global _worker_tokenizer
    # An interrupt reaches every process of the terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The library's threads would oversubscribe the cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = load_tokenizer(folder, eod)


def _encode_chunk(texts: list[str]) -> list[np.ndarray]:
    return [np.array(_worker_tokenizer.encode(text), dtype=np.int32) for text in texts]


class SplitWriter:
    """Writes one split: documents, each with its end token, to PREFIX.bin and .idx, and the record PREFIX.json."""

    def __init__(self, prefix: Path, tokenizer: Tokenizer):
        # Slow to import, and not needed by the workers.
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.tokenizer = tokenizer
        self.dtype = DType.optimal_dtype(tokenizer.vocab_size)
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=self.dtype)
        self.documents = self.tokens = self.text_bytes = self.max_token = self.empty_documents = 0

    def add(self, text: str, ids: np.ndarray) -> None:
        if not ids.size:
            self.empty_documents += 1
            return
        ids = np.append(ids, np.int32(self.tokenizer.eod))
        self.max_token = max(self.max_token, int(ids.max()))
        self.builder.add_document(ids, [ids.size])
        self.documents += 1
        self.tokens += ids.size
        self.text_bytes += len(text.encode())

    def finish(self) -> dict:
        self.builder.finalize(f"{self.prefix}.idx")
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


def _publish(staging: Path, output: Path) -> None:
    """Moves everything from a complete staging folder to the output, the record last."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == RECORD_NAME):
        path.rename(output / path.name)
    staging.rmdir()
