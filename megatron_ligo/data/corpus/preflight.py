"""Checks that come before the work: that each split gets a document, and that the tokenizer keeps the text."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import islice

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.encoding_pool import is_held_out
from megatron_ligo.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SAMPLED_DOCUMENTS = 64
SAMPLE_CHARACTERS = 1000


def check_splits(texts: Iterable[str], valid_fraction: float) -> None:
    """Reads documents until each split has one that is not blank. DataError if a split has none."""
    wanted = {"train", "valid"} if valid_fraction else {"train"}
    count = 0
    for text in texts:
        if not text or text.isspace():
            continue
        count += 1
        wanted.discard("valid" if is_held_out(text.encode(), valid_fraction) else "train")
        if not wanted:
            return
    name = min(wanted)
    hint = "Provide more text, cut it with --separator, or set --valid-fraction (0: no valid split)."
    documents = "1 document" if count == 1 else f"{count} documents"
    raise DataError(
        Problem(f"the {name} split", f"at least one of {documents} (fraction {valid_fraction:g})", "none", hint)
    )


def warn_if_lossy(texts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Warns once, with an example, if decoding the ids of the first documents does not give their text back."""
    samples = [sample for text in islice(texts, SAMPLED_DOCUMENTS) for sample in _take_samples(text)]
    lost = []
    for sample in samples:
        decoded = tokenizer.decode(tokenizer.encode(sample))
        if decoded != sample:
            lost.append(_first_difference(sample, decoded))
    if lost:
        before, after = lost[0]
        log.warning(
            "The tokenizer does not keep the text: %s is read back as %s (in %d of %d samples).",
            before, after, len(lost), len(samples),
        )  # fmt: skip


def _take_samples(text: str) -> Iterator[str]:
    """Yields the start of a document, and its first indented line: a text may begin with a space."""
    start = text[:SAMPLE_CHARACTERS]
    yield start
    indented = next((line for line in start.split("\n") if line[:1] == " " and line.strip()), "")
    if indented and indented != start:
        yield indented


def _first_difference(before: str, after: str) -> tuple[str, str]:
    """Returns both texts around the first character in which they differ, quoted."""
    pairs = zip(before, after, strict=False)
    place = next((index for index, (x, y) in enumerate(pairs) if x != y), min(len(before), len(after)))
    low = max(place - 10, 0)
    return repr(before[low : place + 30]), repr(after[low : place + 30])
