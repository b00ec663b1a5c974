"""Token batches from Megatron-core's datasets: what a step reads depends on the step alone, not on the layout.

Legend: b sequences of a micro-batch, s tokens of a sequence.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from megatron.core.datasets.utils import Split

from megatron_ligo.common.errors import DataError, ErrorCollector, Problem
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.indexed_dataset import IndexedFiles, open_indexed_files
from megatron_ligo.data.masking import Masking
from megatron_ligo.data.megatron_dataset import Blend, open_blend
from megatron_ligo.data.sampler import TRAIN, Batch, ShardedSampler
from megatron_ligo.data.tokenizer import digest_tokenizer
from megatron_ligo.distributed.mesh import all_ranks

log = logging.getLogger(__name__)

# A pair without a record is read once to find its largest token id, up to this size; past it each batch is checked.
SCAN_BYTES = 4 << 30


class TextDataset(ShardedSampler):
    """Training and held-out samples of `seq_length` tokens; `open_text_dataset` builds it.

    first: the sample that step 0 begins with. masking: set for a masked-LM model.
    """

    def __init__(
        self,
        train: torch.utils.data.Dataset,
        valid: torch.utils.data.Dataset | None,
        pairs: list[IndexedFiles],
        first: int = 0,
        masking: Masking | None = None,
    ):
        super().__init__(first)
        self._masking = masking
        self._train = train
        self._valid = valid
        self._pairs = pairs
        self._vocab_size: int | None = None

    def check_vocab(self, vocab_size: int) -> None:
        """DataError on every rank if the data hold a token id that a model of `vocab_size` rows has no row for."""
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

    def _read_micro_batch(self, name: str, indices: range) -> Batch:
        dataset = self._dataset(name)
        samples = [dataset[index] for index in indices]
        if self._masking is not None:
            numbered = zip(samples, indices, strict=True)
            samples = [self._masking.mask_sample(sample["tokens"], name, index) for sample, index in numbered]
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "loss_mask")}
        if self._vocab_size is not None:
            largest = max(int(batch["tokens"].max()), int(batch["labels"].max()))
            if largest >= self._vocab_size:
                where = f"{name} samples {indices.start} to {indices.stop - 1}"
                raise DataError(_vocab_problem(where, self._vocab_size, largest))
        return batch


def open_text_dataset(
    data: DataSection,
    seq_length: int,
    num_train_samples: int,
    num_valid_samples: int,
    seed: int,
    cache_dir: str | Path,
    first: int = 0,
    masking: Masking | None = None,
) -> TextDataset:
    """Opens what [data] names for a run that reads so many samples from sample `first` on. Collective: every rank
    calls it alike.

    The sample indices are built once, by rank 0, under `cache_dir`, which all nodes must see. A corpus that is
    shorter than asked is repeated, and the log says so. Any fault is raised on all ranks as one DataError.
    """
    if masking is not None:
        seq_length -= len(masking.ends)
    blends = all_ranks().run_on_all(
        lambda: _build_blends(data, seq_length, first + num_train_samples, num_valid_samples)
    )
    datasets = {blend.split: open_blend(blend, seq_length, seed, Path(cache_dir)) for blend in blends}
    pairs = [pair for blend in blends for pair in blend.pairs]
    return TextDataset(datasets[Split.train], datasets.get(Split.valid), pairs, first, masking)


def _build_blends(data: DataSection, seq_length: int, num_train: int, num_valid: int) -> list[Blend]:
    errors = ErrorCollector("data", DataError)
    blends = []
    for split, listed, samples in ((Split.train, data.train, num_train), (Split.valid, data.valid, num_valid)):
        if listed:
            blends.append(_build_blend(split, listed, samples, seq_length, errors))
        elif split is Split.train or samples:
            errors.add(f"data.{split.name}", "prefixes of .bin/.idx pairs", "none", "Make them with prepare_data.")
    _check_tokenizer(data.tokenizer, [pair for blend in blends for pair in blend.pairs], errors)
    errors.raise_if_any()
    return blends


def _build_blend(split: Split, listed: tuple, samples: int, seq_length: int, errors: ErrorCollector) -> Blend:
    """Weights and prefixes apart, each pair opened and long enough."""
    weights = tuple(entry for entry in listed if not isinstance(entry, str)) or None
    found = [open_indexed_files(entry, errors) for entry in listed if isinstance(entry, str)]
    pairs = tuple(pair for pair in found if pair is not None)
    for pair in pairs:
        if pair.tokens <= seq_length:
            errors.add(f"{pair.prefix}.bin", f"more than seq_length = {seq_length} tokens", pair.tokens)
    blend = Blend(split, pairs, weights, max(samples, 1))
    if len(found) == len(pairs):
        _check_length(blend, seq_length, errors)
    return blend


def _check_length(blend: Blend, seq_length: int, errors: ErrorCollector) -> None:
    tokens = sum(pair.tokens for pair in blend.pairs)
    asked = blend.samples * seq_length + 1
    if len(blend.pairs) > 1 and blend.weights is None:
        have = sum((pair.tokens - 1) // seq_length for pair in blend.pairs)
        if have < blend.samples:
            hint = "Give each prefix a weight: then they are repeated as needed."
            errors.add(f"data.{blend.name}", f"{blend.samples} samples of {seq_length} tokens", have, hint)
    elif asked > tokens:
        log.info(
            "%s: %d tokens are asked of %d: they are repeated %.1f times.", blend.name, asked, tokens, asked / tokens
        )


def _check_tokenizer(folder: str, pairs: list[IndexedFiles], errors: ErrorCollector) -> None:
    """All records name one tokenizer, and it is the one in the folder if a folder is given."""
    expected = digest_tokenizer(folder) if folder else None
    for pair in pairs:
        if pair.record is None:
            continue
        expected = expected or pair.record["tokenizer"]
        if pair.record["tokenizer"] != expected:
            hint = "Prepare it with the same tokenizer."
            errors.add(f"{pair.prefix}.json", f"tokenizer {expected}", pair.record["tokenizer"], hint)


def _check_token_ids(pairs: list[IndexedFiles], vocab_size: int) -> None:
    errors = ErrorCollector("data and model", DataError)
    for pair in pairs:
        if pair.record is not None:
            smallest, largest = 0, pair.record["max_token"]
        elif pair.bin_bytes <= SCAN_BYTES:
            smallest, largest = pair.token_range()
        else:
            log.info("%s has no record and is large: its token ids are checked as they are read.", pair.prefix)
            continue
        if largest >= vocab_size or smallest < 0:
            errors.add_message(_vocab_problem(f"{pair.prefix}.bin", vocab_size, largest if smallest >= 0 else smallest))
    errors.raise_if_any()


def _vocab_problem(where: str, vocab_size: int, found: int) -> str:
    hint = "The data were made with a tokenizer of another model."
    return Problem(where, f"token ids from 0 to {vocab_size - 1}, as the model has", found, hint)
