"""Masked-LM samples out of running text: which tokens are to be told, and what the model sees in their place.

Everything that is drawn comes from the seed and the number of the sample alone: it is the same at any layout, in any
micro-batch and after any restart, and another one each time that the text comes round again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.tokenizer import read_special_tokens

MASK_NAMES = ("[MASK]", "<mask>")
START_NAMES = ("[CLS]", "<s>")
END_NAMES = ("[SEP]", "</s>")
# Of the tokens that are to be told, these shares are seen as the mask and as some other token; the rest as they are.
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Masking:
    """rate: the share of a sample's tokens that is to be told; mask: the id that hides them; ends: the ids around each
    sample, or none; special: ids that are neither told nor seen in another's place; padding: the id that no sample
    may hold (it would have no position), or None."""

    rate: float
    mask: int
    ends: tuple[int, ...]
    special: frozenset[int]
    vocab_size: int
    padding: int | None
    seed: int
    ordinary_tokens: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        allowed = torch.ones(self.vocab_size, dtype=torch.bool)
        allowed[list(self.special)] = False
        object.__setattr__(self, "others", allowed.nonzero().flatten())

    def mask_sample(self, text: Tensor, split: str, number: int) -> dict[str, Tensor]:
        """tokens (what is seen), labels: int64 [s]; loss_mask: float32 [s]. text: int64 [s - ends].

        As many tokens of each sample are told (BERT's own rule), and each sample weighs as much as any other, however
        many of its tokens are special: a mean over samples does not depend on how they are dealt.
        """
        labels = self._add_ends(text)
        free = torch.isin(labels, self.ordinary_tokens).nonzero().flatten()
        where = f"{split} sample {number}"
        if self.padding is not None and bool((labels == self.padding).any()):
            raise DataError(Problem(where, "no padding", f"token {self.padding}", "Prepare the data without it."))
        if not len(free):
            raise DataError(Problem(where, "tokens to mask", "special tokens only"))
        generator = self._generator(split, number)
        count = min(max(1, round(self.rate * len(labels))), len(free))
        told = free[torch.randperm(len(free), generator=generator)[:count]]
        fate = torch.rand(count, generator=generator)
        other = self.ordinary_tokens[torch.randint(len(self.ordinary_tokens), (count,), generator=generator)]
        tokens, weights = labels.clone(), torch.zeros(len(labels))
        seen = torch.where(fate < MASK_SHARE + RANDOM_SHARE, other, labels[told])
        tokens[told] = torch.where(fate < MASK_SHARE, self.mask, seen)
        weights[told] = 1.0 / count
        return {"tokens": tokens, "labels": labels, "loss_mask": weights}

    def _add_ends(self, text: Tensor) -> Tensor:
        if not self.ends:
            return text
        first, last = (torch.tensor([end]) for end in self.ends)
        return torch.cat([first, text, last])

    def _generator(self, split: str, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{split}:{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def build_masking(data: DataSection, model_config: ModelConfig) -> Masking | None:
    """How the samples for a model are masked; None for a causal one. ConfigError with all that cannot be."""
    if architectures.get(model_config.arch).is_causal:
        return None
    named = read_special_tokens(data.tokenizer) if data.tokenizer else {}

    def first_of(names: tuple[str, ...]) -> int | None:
        return next((named[name] for name in names if name in named), None)

    mask = first_of(MASK_NAMES) if data.mask_token is None else data.mask_token
    ends = tuple(end for end in (first_of(START_NAMES), first_of(END_NAMES)) if end is not None)
    ends = (ends if len(ends) == 2 else ()) if data.ends is None else data.ends
    padding = model_config.position_padding
    special = {*named.values(), *data.special_tokens, *ends, *([] if mask is None else [mask])}
    special |= set() if padding is None else {padding}
    _check_masking(data, model_config, mask, ends, special)
    return Masking(data.mask_rate, mask, ends, frozenset(special), model_config.vocab_size, padding, data.seed)


def _check_masking(
    data: DataSection, model_config: ModelConfig, mask: int | None, ends: tuple[int, ...], special: set[int]
) -> None:
    errors = ErrorCollector("[data] for a masked-LM model", ConfigError)
    if mask is None:
        hint = f"Set it, or data.tokenizer to a tokenizer with {' or '.join(MASK_NAMES)}."
        errors.add("data.mask_token", "the id of the mask token", "none", hint)
    if len(ends) not in (0, 2):
        errors.add("data.ends", "two ids, or an empty list", list(ends))
    for token in sorted(special):
        if token >= model_config.vocab_size:
            errors.add("special token", f"an id from 0 to {model_config.vocab_size - 1}, as the model has", token)
    if len(special) >= model_config.vocab_size:
        errors.add("data.special_tokens", "some tokens that are not special", "none")
    if data.seq_length <= len(ends):
        errors.add("data.seq_length", f"more than the {len(ends)} tokens around a sample", data.seq_length)
    errors.raise_if_any()
