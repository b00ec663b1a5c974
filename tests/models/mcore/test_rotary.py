"""Rotary positions of every kind: transformers' frequencies, factors and logits."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_ligo.arch.rope_frequencies import rotary_frequencies
from megatron_ligo.arch.rope_scaling import KINDS, attention_factor
from tests.models.mcore import rope_kinds, rotary_cases
from tests.tiny_models import llama_config

DRAWS = 40


def test_the_kinds_are_those_of_transformers():
    # A proportional scaling of a whole head is a linear one; of a part, no family of ours has it.
    assert set(KINDS) | {"proportional"} == set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_are_those_of_transformers(kind):
    rng = random.Random(kind)
    for _ in range(DRAWS):
        head_dim, base = rng.choice([4, 16, 64, 128]), rng.choice([500.0, 10000.0, 1e6])
        max_positions = rng.choice([64, 128, 5000])
        scaling = rope_kinds.draw(kind, head_dim // 2, rng)
        config = LlamaConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            max_position_embeddings=max_positions,
            rope_theta=base,
            rope_scaling=dict(scaling),
        )
        model_config = llama_config(
            head_dim=head_dim, rope_base=base, max_positions=max_positions, rope_scaling=dict(scaling)
        )
        for length in (10, max_positions, max_positions + 1, 3 * max_positions):
            expected, factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
            frequencies = rotary_frequencies(model_config, length)
            assert torch.allclose(frequencies, expected, rtol=2e-6, atol=0), (scaling, length)
            assert attention_factor(model_config.rope_scaling) == pytest.approx(factor, rel=1e-12), scaling
            # What fills in the model's sizes states the same alone.
            elsewhere = replace(model_config, max_positions=77) if kind != "dynamic" else model_config
            assert torch.equal(rotary_frequencies(elsewhere, length), frequencies)
            assert attention_factor(elsewhere.rope_scaling) == attention_factor(model_config.rope_scaling)


@pytest.mark.parametrize("name", rope_kinds.SCALINGS)
def test_logits_are_those_of_transformers(pools, name):
    gaps = pools(2).run(rotary_cases.logits_gaps, scaling=rope_kinds.SCALINGS[name])
    assert max(gaps.values()) < 2e-6, gaps
