"""Tokenizes text in parallel into Megatron-core's indexed datasets; the same input gives the same bytes.

The memory does not depend on the amount of text: files are read in blocks, documents are encoded in windows, and only
a few chunks per worker are in flight.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ligo.common.atomic_files import fsync_tree, read_json, write_json
from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.common.folder_kinds import DATA, TEXTS, check_output
from megatron_ligo.data.corpus.encoding_pool import ChunkEncoder, EncodedChunks, EncodingPool, is_held_out
from megatron_ligo.data.corpus.preflight import check_splits, warn_if_lossy
from megatron_ligo.data.corpus.split_writer import SplitWriter
from megatron_ligo.data.documents import BadLines, DocumentSource
from megatron_ligo.data.tokenizer import (
    PRETRAINING_EOD_NAMES,
    TOKENIZER_FOLDER,
    digest_tokenizer,
    load_tokenizer,
    train_sentencepiece,
)

log = logging.getLogger(__name__)

RECORD_NAME = "prepared.json"
STAGING_NAME = ".preparing"
# sentencepiece is trained on this much of the training split.
TOKENIZER_TRAINING_BYTES = 16 << 20
# The end token of a tokenizer that is trained here.
TRAINED_END_TOKEN = "</s>"


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
    DataError before the work if a split would have no document, and for a damaged file or a bad line where it is read.
    """
    fingerprint = json.loads(json.dumps(recipe.fingerprint()))
    # A file of the folder may be the text.
    check_output(output, DATA, TEXTS)
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
            splits, texts = _prepare(recipe, staging, workers)
            fsync_tree(staging)
            write_json(staging / RECORD_NAME, {"fingerprint": fingerprint, "splits": splits, "texts": texts})
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
    present = sorted(
        path.name for path in output.glob("*") if path.stem in ("train", "valid", TOKENIZER_FOLDER, "prepared")
    )
    if present:
        hint = "Choose another --output, or remove them."
        raise DataError(Problem(str(output), "no data, or data from the same texts and tokenizer", present, hint))
    return None


def _prepare(recipe: TextRecipe, staging: Path, workers: int) -> tuple[dict, dict]:
    """Writes everything into the staging folder; returns the splits' records and what was done with the texts."""
    folder = staging / TOKENIZER_FOLDER
    folder.mkdir()
    tokenizer = None if recipe.train_vocab else load_tokenizer(recipe.tokenizer, recipe.eod)
    end_token = tokenizer.eod_text if tokenizer else recipe.eod or TRAINED_END_TOKEN
    texts = recipe.texts.cut(end_token, PRETRAINING_EOD_NAMES, held_out=recipe.valid_fraction > 0)
    for path, separator in texts.cuts.items():
        log.info("%s: cut into documents at %s", path, separator)
    check_splits(texts, recipe.valid_fraction)
    if tokenizer is None:
        train_sentencepiece(_sample_training_texts(texts, recipe.valid_fraction), recipe.train_vocab, folder)
        tokenizer = load_tokenizer(folder, recipe.eod)
    else:
        for path in tokenizer.files:
            shutil.copyfile(path, folder / path.name)
    warn_if_lossy(texts, tokenizer)
    bad_lines = BadLines(texts)
    encoder = ChunkEncoder(tokenizer, texts.json_key, recipe.valid_fraction)
    splits = _write_splits(texts, encoder, bad_lines, staging, workers)
    return splits, {
        "files": len(texts.files),
        "notes": list(texts.notes),
        "cut_at": {str(path): str(separator) for path, separator in texts.cuts.items()},
        "bad_lines_skipped": dict(bad_lines.counts),
    }


def _sample_training_texts(texts: DocumentSource, valid_fraction: float) -> Iterator[str]:
    """Yields the first documents of the training split, about TOKENIZER_TRAINING_BYTES of them."""
    total = 0
    for text in texts:
        data = text.encode()
        if not is_held_out(data, valid_fraction):
            yield text
            total += len(data)
        if total > TOKENIZER_TRAINING_BYTES:
            return


def _write_splits(
    texts: DocumentSource, encoder: ChunkEncoder, bad_lines: BadLines, staging: Path, workers: int
) -> dict:
    names = ("train", "valid") if encoder.valid_fraction else ("train",)
    with ExitStack() as stack:
        writers = {name: SplitWriter(staging / name, encoder.tokenizer) for name in names}
        for writer in writers.values():
            stack.callback(writer.close)
        pool = EncodingPool(encoder, texts.read_chunks(), workers, staging)
        total = 0
        for encoded in _show_progress(pool, texts.total_bytes()):
            for path, located in groupby(encoded.problems, itemgetter(0)):
                bad_lines.add(path, [problem for _, problem in located], pool.unread_chunks())
            ends = total + np.cumsum(encoded.sizes)
            within = ends <= texts.max_bytes if texts.max_bytes else np.ones(len(ends), bool)
            for name, writer in writers.items():
                chosen = within & (encoded.held_out == (name == "valid"))
                ids = encoded.ids[np.repeat(chosen, encoded.lengths)]
                filled = chosen & (encoded.lengths > 0)
                writer.add(ids, encoded.lengths[chosen], int(encoded.sizes[filled].sum()))
            if not within.all():
                break
            total = int(ends[-1]) if len(ends) else total
    for name, writer in writers.items():
        if not writer.documents:
            hint = "Provide more text, or set --valid-fraction."
            raise DataError(Problem(f"the {name} split", "at least one document with tokens", "none", hint))
    if bad_lines.counts:
        log.warning("%d bad lines were skipped.", bad_lines.counts.total())
    return {name: writer.finish() for name, writer in writers.items()}


def _show_progress(pool: EncodingPool, total_bytes: int) -> Iterator[EncodedChunks]:
    """Yields the pool's results, with a progress bar of the bytes read if the output is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("tokens"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes)
        path, position, finished = "", 0, 0
        for chunk, encoded in pool:
            if chunk.path != path:
                path, finished = chunk.path, finished + position
            position = chunk.position
            bar.update(task, completed=finished + position)
            yield encoded


def _publish(staging: Path, output: Path) -> None:
    """Moves everything from a complete staging folder to the output, the record last."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == RECORD_NAME):
        path.rename(output / path.name)
    staging.rmdir()
