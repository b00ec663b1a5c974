"""Makes masked-LM samples from text: selects the tokens to predict and what replaces them in the input.

Random choices depend on the seed, the split and the sample index alone. A sample is masked the same at any layout and
micro-batch size and after any restart. A repeat of the corpus has other indices, and thus other masks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.tokenizer import read_special_tokens

MASK_NAMES = ("[MASK]", "<mask>")
START_NAMES = ("[CLS]", "<s>")
END_NAMES = ("[SEP]", "</s>")
# Shares of the predicted tokens that become the mask token or a random token; the rest stay (BERT, arXiv 1810.04805).
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """The masking of one model's samples.

    rate: share of a sample's tokens to predict. mask: id of the mask token. ends: ids around each sample, or none.
    special: ids that are neither predicted nor used as random replacements. padding: id that no sample may contain,
    because it has no position embedding, or None.
    """

    rate: float
    mask: int
    ends: tuple[int, ...]
    special: frozenset[int]
    vocab_size: int
    padding: int | None
    seed: int
    ordinary_tokens: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        is_ordinary = torch.ones(self.vocab_size, dtype=torch.bool)
        is_ordinary[list(self.special)] = False
        object.__setattr__(self, "ordinary_tokens", is_ordinary.nonzero().flatten())

    def mask_sample(self, text: Tensor, split: str, index: int) -> dict[str, Tensor]:
        """Masks one sample. text: int64 [s - len(ends)].

        Returns `tokens` (the model's input) and `labels`: int64 [s]; `loss_mask`: float32 [s], with sum 1. Each sample
        has the same number of predicted tokens (as in BERT) and the same weight, however many special tokens it has:
        a mean over samples does not depend on how they are grouped. Raises DataError if nothing can be masked.
        """
        labels = self._add_ends(text)
        candidates = torch.isin(labels, self.ordinary_tokens).nonzero().flatten()
        where = f"{split} sample {index}"
        if self.padding is not None and bool((labels == self.padding).any()):
            raise DataError(Problem(where, "no padding", f"token {self.padding}", "Prepare the data without padding."))
        if not len(candidates):
            raise DataError(Problem(where, "ordinary tokens to mask", "special tokens only"))
        generator = seeded_generator(self.seed, f"{split}:{index}")
        count = min(max(1, round(self.rate * len(labels))), len(candidates))
        predicted = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        fate = torch.rand(count, generator=generator)
        choices = torch.randint(len(self.ordinary_tokens), (count,), generator=generator)
        replacements = self.ordinary_tokens[choices]
        tokens, weights = labels.clone(), torch.zeros(len(labels))
        unmasked = torch.where(fate < MASK_SHARE + RANDOM_SHARE, replacements, labels[predicted])
        tokens[predicted] = torch.where(fate < MASK_SHARE, self.mask, unmasked)
        weights[predicted] = 1.0 / count
        return {"tokens": tokens, "labels": labels, "loss_mask": weights}

    def _add_ends(self, text: Tensor) -> Tensor:
        """Adds the end ids: [s - len(ends)] -> [s]."""
        if not self.ends:
            return text
        first, last = (torch.tensor([end]) for end in self.ends)
        return torch.cat([first, text, last])


def build_masking(section: DataSection, model_config: ModelConfig) -> Masking | None:
    """Returns the masking of a model's samples; None for a causal model. Raises ConfigError with every problem."""
    if architectures.get(model_config.arch).is_causal:
        return None
    tokenizer_ids = read_special_tokens(section.tokenizer) if section.tokenizer else {}

    def find_id(names: tuple[str, ...]) -> int | None:
        return next((tokenizer_ids[name] for name in names if name in tokenizer_ids), None)

    mask = find_id(MASK_NAMES) if section.mask_token is None else section.mask_token
    ends = tuple(end for end in (find_id(START_NAMES), find_id(END_NAMES)) if end is not None)
    ends = (ends if len(ends) == 2 else ()) if section.ends is None else section.ends
    padding = model_config.position_padding
    optional_ids = {token for token in (mask, padding) if token is not None}
    special = {*tokenizer_ids.values(), *section.special_tokens, *ends, *optional_ids}
    _check_masking(section, model_config, mask, ends, special)
    return Masking(section.mask_rate, mask, ends, frozenset(special), model_config.vocab_size, padding, section.seed)


def _check_masking(
    section: DataSection, model_config: ModelConfig, mask: int | None, ends: tuple[int, ...], special: set[int]
) -> None:
    errors = ErrorCollector("[data] for a masked-LM model", ConfigError)
    if mask is None:
        hint = f"Set it, or set data.tokenizer to a tokenizer with {' or '.join(MASK_NAMES)}."
        errors.add("data.mask_token", "the id of the mask token", "none", hint)
    if len(ends) not in (0, 2):
        errors.add("data.ends", "two ids or an empty list", list(ends))
    for token in sorted(special):
        if token >= model_config.vocab_size:
            errors.add("special token", f"an id from 0 to {model_config.vocab_size - 1} (the model's)", token)
    if len(special) >= model_config.vocab_size:
        errors.add("data.special_tokens", "fewer ids than the vocabulary has", len(special))
    if section.seq_length <= len(ends):
        errors.add("data.seq_length", f"more than the {len(ends)} tokens around a sample", section.seq_length)
    errors.raise_if_any()
