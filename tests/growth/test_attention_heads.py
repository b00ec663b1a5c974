"""Another ratio of query heads to KV heads, another head size: exact by a rule, or refused by name."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth import attention_heads
from megatron_ligo.growth.validation import build_initial_operator
from tests.growth.logit_gap import logits_gap
from tests.models.mcore.rope_kinds import SCALINGS
from tests.tiny_models import hf_llama, llama_config, memory_of

# The small model has 6 query heads on 3 KV heads, of 4 features.
EXACT = {
    "more query heads a group": LargeSection(num_heads=12),
    "half as many more": LargeSection(hidden_size=27, num_heads=9),
    "to multi-head attention": LargeSection(num_kv_heads=6),
    "wider, more of both": LargeSection(num_layers=4, hidden_size=32, ffn_size=44, num_heads=16, num_kv_heads=4),
    "twice the head size": LargeSection(head_dim=8),
    "half as much again": LargeSection(head_dim=6),
    "all at once": LargeSection(hidden_size=48, num_heads=12, num_kv_heads=12, head_dim=10, num_layers=5),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact(case):
    small = llama_config(tied="wider" in case)
    assert logits_gap(small, EXACT[case], OperatorSection(noise=0.5)) < 5e-6


def test_exact_with_biases_with_random_copies_and_with_a_map_for_each_layer():
    small = llama_config(model_type="qwen2", qkv_bias=True)
    large = LargeSection(hidden_size=48, num_heads=24, num_kv_heads=4, head_dim=6, num_layers=4)
    for keys in ({}, {"method": "net2net"}, {"share": {"default": "layer", "residual": "all"}}):
        assert logits_gap(small, large, OperatorSection(**keys)) < 5e-6, keys


@pytest.mark.parametrize("large", [LargeSection(hidden_size=36), LargeSection(num_kv_heads=2, num_heads=12)])
def test_noise_of_a_single_key_head(large):
    """The spread of one entry is no number."""
    assert logits_gap(llama_config(num_kv_heads=1), large, OperatorSection(noise=0.5)) < 5e-6


def test_uncorrected_heads_are_detected(monkeypatch):
    """The controls: without the base of the rotary angles, and without the scale of the scores."""
    small, large = llama_config(), LargeSection(head_dim=6)
    monkeypatch.setattr(attention_heads, "large_rope_base", lambda small, head_dim: small.rope_base)
    assert logits_gap(small, large, OperatorSection()) > 1e-4
    monkeypatch.undo()
    monkeypatch.setattr(attention_heads, "head_feature_map", lambda part, *sizes: unscaled(part, *sizes))
    assert logits_gap(small, large, OperatorSection()) > 1e-3


def unscaled(part, *sizes, features=attention_heads.head_feature_map):
    return features(part, *sizes).clamp(max=1.0)


def test_pairs_keep_their_frequencies():
    for small_dim, large_dim in ((4, 8), (4, 6), (64, 96), (64, 128)):
        model_config = llama_config(head_dim=small_dim)
        base = attention_heads.large_rope_base(model_config, large_dim)
        head = attention_heads.HeadGrowth(small_dim, large_dim, small_dim, large_dim)
        place = attention_heads.head_feature_map("k", head).argmax(dim=0)[: small_dim // 2]
        before = model_config.rope_base ** (-2 * torch.arange(small_dim // 2, dtype=torch.float64) / small_dim)
        assert torch.allclose(base ** (-2 * place.double() / large_dim), before, rtol=1e-12)


def test_new_features_can_learn():
    """q's and v's new features are no zeros, though those of k are."""
    small = llama_config()
    operator = build_initial_operator(small, LargeSection(head_dim=8), OperatorSection())
    grown = GrownReader(operator, memory_of(hf_llama(small), small))
    for row, zeros in (("q", 0), ("v", 0), ("k", 3 * 4)):
        rows = grown.read(f"layers.0.{row}")
        assert int((rows == 0).all(dim=1).sum()) == zeros


def test_keys_and_values_are_merged_by_their_mean():
    small = llama_config(num_kv_heads=6, head_dim=4)
    settings = OperatorSection(width_init={"default": "lossless", "groups": "mean"})
    source = memory_of(hf_llama(small), small)
    grown = GrownReader(build_initial_operator(small, LargeSection(num_kv_heads=2), settings), source)
    key = source.read("layers.1.k").view(2, 3, 4, 24)
    assert torch.allclose(grown.read("layers.1.k").view(2, 4, 24), key.mean(dim=1), atol=1e-7)
    for row in ("q", "o", "up"):
        assert torch.equal(grown.read(f"layers.1.{row}"), source.read(f"layers.1.{row}"))


REFUSED = {
    "fewer": (LargeSection(num_kv_heads=2), {}, "large.num_kv_heads"),
    "smaller": (LargeSection(head_dim=2), {}, "large.head_dim"),
    "no divisor": (
        LargeSection(num_kv_heads=2),
        {"width_init": {"default": "copy", "groups": "mean"}},
        "large.num_kv_heads",
    ),
    "dense": (LargeSection(head_dim=8), {"method": "ligo"}, "operator.structure"),
    "fresh": (LargeSection(num_kv_heads=6), {"method": "lemon"}, "operator.fresh"),
    "frozen": (LargeSection(num_kv_heads=6), {"identity": "frozen", "width_init": "copy"}, "operator.identity"),
    "no rule": (
        LargeSection(num_kv_heads=6),
        {"width_init": {"default": "copy", "groups": "random"}},
        "operator.width_init (groups)",
    ),
    "shares differ": (
        LargeSection(num_kv_heads=6),
        {"share": {"default": "all", "heads": "layer"}},
        "operator.share (heads)",
    ),
    "starts differ": (
        LargeSection(num_kv_heads=6),
        {"width_init": {"default": "copy", "heads": "select"}},
        "operator.width_init.heads",
    ),
    "mean of others": (LargeSection(), {"width_init": {"default": "copy", "ffn": "mean"}}, "operator.width_init (ffn)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    large, keys, where = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        build_initial_operator(llama_config(), large, OperatorSection(**keys))
    assert where in [problem.where for problem in error.value.problems]


def test_a_query_head_without_a_copy_is_refused():
    large = LargeSection(hidden_size=30, num_heads=10, num_kv_heads=5)
    with pytest.raises(ConfigError) as error:
        build_initial_operator(llama_config(num_heads=9), large, OperatorSection())
    (problem,) = error.value.problems
    assert problem.where == "large.num_heads / large.num_kv_heads" and problem.found.endswith("query head 8")


def test_scalings_that_depend_on_the_head_size_are_refused():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    for name, scaling, head_dim in (
        ("yarn", yarn, 16),
        ("dynamic", SCALINGS["dynamic"], 4),
        ("longrope", SCALINGS["longrope"], 4),
    ):
        small = llama_config(head_dim=head_dim, rope_scaling=scaling)
        with pytest.raises(ConfigError) as error:
            build_initial_operator(small, LargeSection(head_dim=2 * head_dim), OperatorSection())
        (problem,) = error.value.problems
        assert problem.where == "large.head_dim" and f"'{name}'" in problem.expected


# Without rounding, YaRN's ramp is one in the frequency.
SMOOTH_YARN = {"rope_type": "yarn", "factor": 4.0, "truncate": False, "attention_factor": 1.3}
SMOOTH_YARN |= {"original_max_position_embeddings": 300, "beta_fast": 8.0}


@pytest.mark.parametrize("name", [*SCALINGS, "smooth yarn"])
def test_scaled_positions_grow_lossless(name):
    """Another head size where the scaling allows it; wider, deeper, and with a longer context in any case."""
    small = llama_config(rope_scaling=SCALINGS.get(name, SMOOTH_YARN))
    longer = {} if name == "dynamic" else {"max_positions": 128}
    wide = {"hidden_size": 48, "num_heads": 12, "num_kv_heads": 6, "num_layers": 4, **longer}
    head_dims = (8, 6) if name in ("linear", "llama3") else (8,) if name == "smooth yarn" else ()
    for head_dim in (None, *head_dims):
        large = LargeSection(**wide, head_dim=head_dim)
        assert logits_gap(small, large, OperatorSection(noise=0.5)) < 5e-6, head_dim
