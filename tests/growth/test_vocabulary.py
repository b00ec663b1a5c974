"""A larger vocabulary: old tokens keep their logits, new ones begin around the mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.growth.logit_gap import RAGGED
from tests.tiny_models import hf_from, hf_llama, llama_config, memory_of, tokens

MORE = replace(RAGGED, vocab_size=1037)


def grown(small, noise=0.0, large=MORE):
    source = memory_of(hf_llama(small).double(), small)
    return GrownReader(build_initial_operator(small, large, OperatorSection(vocab_noise=noise)), source)


@pytest.mark.parametrize("tied", [False, True])
def test_old_tokens_keep_logits_and_new_ones_start_at_the_mean(tied):
    small = llama_config(tied=tied)
    ids = tokens(small)
    with torch.no_grad():
        before, after = hf_llama(small).double()(ids).logits, hf_from(grown(small))(ids).logits
    assert after.shape[-1] == 1037
    assert float((after[..., :37] - before).abs().max()) < 5e-6
    assert float((after[..., 37:] - before.mean(dim=-1, keepdim=True)).abs().max()) < 5e-6


def test_noise_is_relative_to_the_tokens_spread():
    small = llama_config()
    for key in ("embed", "head"):
        table = grown(small, noise=0.5, large=LargeSection(vocab_size=1037)).read(key)
        spread = table[37:].std(dim=0) / table[:37].std(dim=0)
        assert spread.min() > 0.45 and spread.max() < 0.55
        assert torch.equal(table[:37], grown(small).source.read(key))
    both = [grown(small, noise=0.5).read(key)[37:] for key in ("embed", "head")]
    assert not torch.allclose(*both)


def test_a_smaller_vocabulary_is_refused():
    with pytest.raises(ConfigError) as error:
        grown(llama_config(), large=LargeSection(vocab_size=36))
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == ("large.vocab_size", "36") and "37" in problem.expected
