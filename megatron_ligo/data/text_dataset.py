"""Token batches from Megatron-core's datasets. A step's samples depend on the step alone, not on the layout.

Legend: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core.datasets.utils import Split

from megatron_ligo.common.errors import DataError, ErrorCollector, Problem
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.indexed_dataset import IndexedFiles, open_indexed_files
from megatron_ligo.data.masking import Masking
from megatron_ligo.data.megatron_dataset import Blend, open_blend
from megatron_ligo.data.sampler import TRAIN, Batch, ShardedSampler
from megatron_ligo.data.tokenizer import choose_tokenizers, digest_tokenizer
from megatron_ligo.distributed.mesh import all_ranks

log = logging.getLogger(__name__)

# Up to this size, a pair without a record is scanned for its largest token id; above it, each batch is checked.
SCAN_BYTES = 4 << 30


class TextDataset(ShardedSampler):
    """Training and held-out samples of `seq_length` tokens; `open_text_dataset` builds it.

    masking: for a masked-LM model; None: labels are the next tokens.
    """

    def __init__(
        self,
        train: torch.utils.data.Dataset,
        valid: torch.utils.data.Dataset | None,
        pairs: list[IndexedFiles],
        first_sample: int = 0,
        masking: Masking | None = None,
    ):
        super().__init__(first_sample)
        self._masking = masking
        self._train = train
        self._valid = valid
        self._pairs = pairs
        self._vocab_size: int | None = None

    def check_vocab(self, vocab_size: int) -> None:
        """Raises DataError on every rank if the data contain a token id outside the model's vocabulary."""
        self._vocab_size = vocab_size
        all_ranks().run_on_rank_0(lambda: _check_token_ids(self._pairs, vocab_size))

    def _num_samples(self, split: str) -> int:
        return len(self._dataset(split))

    def _dataset(self, split: str) -> torch.utils.data.Dataset:
        if split == TRAIN:
            return self._train
        if self._valid is None:
            raise DataError(Problem("data.valid", "prefixes of held-out data", "none", "Set it to evaluate."))
        return self._valid

    def _read_micro_batch(self, split: str, indices: range) -> Batch:
        dataset = self._dataset(split)
        samples = [dataset[index] for index in indices]
        if self._masking is not None:
            pairs = zip(samples, indices, strict=True)
            samples = [self._masking.mask_sample(sample["tokens"], split, index) for sample, index in pairs]
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in ("tokens", "labels", "loss_mask")}
        if self._vocab_size is not None:
            largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
            if largest >= self._vocab_size:
                where = f"{split} samples {indices.start} to {indices.stop - 1}"
                raise DataError(_vocab_problem(where, self._vocab_size, largest))
        return batch


def open_text_dataset(
    section: DataSection,
    seq_length: int,
    num_train: int,
    num_valid: int,
    seed: int,
    cache_dir: str | Path,
    first_sample: int = 0,
    masking: Masking | None = None,
    tokenizers: Sequence[Path] = (),
) -> TextDataset:
    """Opens the data of a run that reads `num_train` training samples from `first_sample` on. Collective.

    Rank 0 builds the sample indices once, under `cache_dir`, which all nodes must see. A corpus that is too short is
    repeated, and the log says so. tokenizers: files, of which one must be that of the data's records; (): any, but one
    for all records. Any problem raises one DataError on all ranks.
    """
    if masking is not None:
        seq_length -= len(masking.ends)
    blends = all_ranks().run_on_all(
        lambda: _build_blends(section, seq_length, first_sample + num_train, num_valid, tokenizers)
    )
    opened = [open_blend(blend, seq_length, seed, Path(cache_dir)) for blend in blends]
    datasets = {blend.split: dataset for blend, (dataset, _, _) in zip(blends, opened, strict=True)}
    pairs = [pair for blend in blends for pair in blend.pairs]
    text = TextDataset(datasets[Split.train], datasets.get(Split.valid), pairs, first_sample, masking)
    text.index_digests = {
        f"{blend.samples} samples of data.{blend.name}": (folder, digest)
        for blend, (_, folder, digest) in zip(blends, opened, strict=True)
    }
    return text


def _build_blends(
    section: DataSection, seq_length: int, num_train: int, num_valid: int, tokenizers: Sequence[Path]
) -> list[Blend]:
    errors = ErrorCollector("data", DataError)
    blends = []
    for split, entries, samples in ((Split.train, section.train, num_train), (Split.valid, section.valid, num_valid)):
        if entries:
            blends.append(_build_blend(split, entries, samples, seq_length, errors))
        elif split is Split.train or samples:
            hint = "Create them with `ligo prepare`."
            errors.add(f"data.{split.name}", "prefixes of .bin/.idx pairs", "none", hint)
    _check_tokenizer(
        tokenizers or choose_tokenizers(section.tokenizer, ()),
        [pair for blend in blends for pair in blend.pairs],
        errors,
    )
    errors.raise_if_any()
    return blends


def _build_blend(split: Split, entries: tuple, samples: int, seq_length: int, errors: ErrorCollector) -> Blend:
    """Separates weights from prefixes and opens each pair; adds errors for pairs that are unusable or too short."""
    weights = tuple(entry for entry in entries if not isinstance(entry, str)) or None
    opened = [open_indexed_files(entry, errors) for entry in entries if isinstance(entry, str)]
    pairs = tuple(pair for pair in opened if pair is not None)
    for pair in pairs:
        if pair.tokens <= seq_length:
            errors.add(f"{pair.prefix}.bin", f"more than seq_length = {seq_length} tokens", pair.tokens)
    blend = Blend(split, pairs, weights, max(samples, 1))
    if len(opened) == len(pairs):
        _check_length(blend, seq_length, errors)
    return blend


def _check_length(blend: Blend, seq_length: int, errors: ErrorCollector) -> None:
    """Adds an error if an unweighted blend is too short; logs how often any other blend is repeated."""
    tokens = sum(pair.tokens for pair in blend.pairs)
    required = blend.samples * seq_length + 1
    if len(blend.pairs) > 1 and blend.weights is None:
        available = sum((pair.tokens - 1) // seq_length for pair in blend.pairs)
        if available < blend.samples:
            hint = "Give each prefix a weight: weighted data repeat as needed."
            errors.add(f"data.{blend.name}", f"{blend.samples} samples of {seq_length} tokens", available, hint)
    elif required > tokens:
        message = "%s: the run needs %d tokens and the data have %d: they are repeated %.1f times."
        log.info(message, blend.name, required, tokens, required / tokens)


def _check_tokenizer(files: Sequence[Path], pairs: list[IndexedFiles], errors: ErrorCollector) -> None:
    """Adds an error for each record whose tokenizer is none of the files' (no files: not the first record's)."""
    expected = {digest_tokenizer(file): f" ({file})" for file in files}
    without_record = [pair.prefix for pair in pairs if pair.record is None]
    if without_record and files:
        message = "no record says which tokenizer made %s: that it was %s is not checked"
        log.info(message, ", ".join(dict.fromkeys(without_record)), " or ".join(map(str, files)))
    for pair in pairs:
        if pair.record is None:
            continue
        expected = expected or {pair.record["tokenizer"]: ""}
        if pair.record["tokenizer"] not in expected:
            names = " or ".join(f"{digest}{where}" for digest, where in expected.items())
            hint = "Prepare it with that tokenizer, or set data.tokenizer to the one that it was prepared with."
            errors.add(f"{pair.prefix}.json", f"tokenizer {names}", pair.record["tokenizer"], hint)


def _check_token_ids(pairs: list[IndexedFiles], vocab_size: int) -> None:
    errors = ErrorCollector("data and model", DataError)
    for pair in pairs:
        if pair.record is not None:
            smallest, largest = 0, pair.record["max_token"]
        elif pair.bin_bytes <= SCAN_BYTES:
            smallest, largest = pair.token_range()
        else:
            log.info("%s has no record and is large: token ids are checked in each batch.", pair.prefix)
            continue
        if largest >= vocab_size or smallest < 0:
            errors.add_message(_vocab_problem(f"{pair.prefix}.bin", vocab_size, largest if smallest >= 0 else smallest))
    errors.raise_if_any()


def _vocab_problem(where: str, vocab_size: int, token: int) -> Problem:
    hint = "The data were prepared with the tokenizer of another model."
    return Problem(where, f"token ids from 0 to {vocab_size - 1} (the model's)", token, hint)
