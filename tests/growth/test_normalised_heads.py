"""Another head size in families whose queries and keys are normalised, or rotate in part: transformers' logits stay."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.handoff import build_moments_record
from megatron_ligo.growth import attention_heads
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import build_initial_operator
from tests import decoder_models, layer_norm_models, layer_pattern_models
from tests.growth.test_adam_state import WithMoments
from tests.tiny_models import tokens

FAMILIES = {
    "qwen3": {"norm_eps": 1e-7},
    "olmo2": {"norm_eps": 1e-7},
    "olmo3": {"norm_eps": 1e-7, "rope_scaling": None, "window_rope_base": 500.0},
    "gemma3": {},
    "exaone4": {},
}
LARGE = {
    "twice": {"head_dim": 8},
    "half as much again": {"head_dim": 6},
    "with everything else": {**layer_pattern_models.RAGGED, "head_dim": 10},
}


def config_of(family: str, **changes) -> ModelConfig:
    module = decoder_models if family in decoder_models.OWN else layer_pattern_models
    return module.config_of(family, **{**FAMILIES.get(family, {}), **changes})


def gap(small: ModelConfig, large: dict, folder, **keys) -> float:
    """Largest difference of the logits of transformers' own classes, fp32, eager attention, over their scale."""
    network = layer_norm_models.model_of(small)
    source = layer_norm_models.memory_of(network, small)
    grown = GrownReader(build_initial_operator(small, LargeSection(**large), OperatorSection(**keys)), source)
    convert(grown, folder, "hf")
    again = type(network).from_pretrained(folder, attn_implementation="eager").eval()
    network.set_attn_implementation("eager")
    ids = tokens(small)
    with torch.no_grad():
        before, after = network(ids).logits, again(ids).logits
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact(tmp_path, family, case):
    assert gap(config_of(family, tied=case == "twice"), LARGE[case], tmp_path, noise=0.5) < 1e-5


def test_exact_with_biases_and_by_every_lossless_method(tmp_path):
    small = config_of("qwen3", qkv_bias=True, output_bias=True)
    for name, method in METHODS.items():
        # The others start with random rows, which are not defined for another head size.
        if method.is_lossless and method.keys.get("fresh", "none") == "none":
            large = {"hidden_size": 48, "num_heads": 12, "num_kv_heads": 6, "head_dim": 6, "ffn_size": 56}
            assert gap(small, large, tmp_path / name, method=name) < 1e-5, name


@pytest.mark.parametrize("family, part", [("qwen3", "q"), ("qwen3", "k"), ("olmo2", "q"), ("gemma3", "k")])
def test_gains_that_stay_are_seen(tmp_path, monkeypatch, family, part):
    """Negative control."""
    gains = attention_heads.head_gain_map
    plain = lambda which, head: (gains(which, head) > 0).double() if which == part else gains(which, head)  # noqa: E731
    monkeypatch.setattr(attention_heads, "head_gain_map", plain)
    assert gap(config_of(family), LARGE["half as much again"], tmp_path) > 1e-3


@pytest.mark.parametrize("case", ["llama4_text", "llama4_text with biases"])
def test_norms_without_gains_want_whole_multiples(tmp_path, case):
    """Beside layers that do not rotate, whose queries and keys are not normalised."""
    small = layer_pattern_models.config_of(case, norm_eps=1e-7)
    assert gap(small, {"head_dim": 8}, tmp_path / "a", noise=0.5) < 1e-5
    assert gap(small, {**layer_pattern_models.RAGGED, "head_dim": 12}, tmp_path / "b") < 1e-5
    if small.l2_normalises_heads:
        with pytest.raises(ConfigError, match="head_dim: expected a multiple of 4"):
            build_initial_operator(small, LargeSection(head_dim=6), OperatorSection())


@pytest.mark.parametrize("family, head_dim", [("stablelm", 16), ("phi3", 12), ("phi3", 20)])
def test_a_part_of_each_head_rotates(tmp_path, family, head_dim):
    """4 of 8 features: pairs keep their place among those that rotate, or their frequency by another base."""
    small = config_of(family, hidden_size=48, head_dim=8)
    large = LargeSection(hidden_size=6 * head_dim, head_dim=head_dim)
    operator = build_initial_operator(small, large, OperatorSection())
    assert (operator.large.rope_base == small.rope_base) == (head_dim != 12 and head_dim != 20)
    assert gap(small, {"hidden_size": 6 * head_dim, "head_dim": head_dim}, tmp_path) < 1e-5


def test_the_moments_of_normalised_queries_are_called_an_estimate():
    small = config_of("qwen3")
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small), small)
    source = WithMoments(small, source.tensors, source.tensors)
    for head_dim, is_estimate in ((4, False), (8, True)):
        operator = build_initial_operator(small, LargeSection(head_dim=head_dim), OperatorSection())
        record = build_moments_record(GrownReader(operator, source, "grow"))
        assert ("an estimate for q" in record["exp_avg"]) == is_estimate
