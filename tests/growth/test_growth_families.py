"""Growth of GPT-2, GPT-NeoX, BERT and RoBERTa in fp64 against the real transformers models."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth import initializers
from megatron_ligo.growth.methods import METHODS, describe_method
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator
from tests import layer_norm_models

# Whole multiples of the residual stream, heads and neurons at a ragged one.
DOUBLE = LargeSection(hidden_size=48, ffn_size=100, num_heads=12)
# GPT-2's residual stream kept as it is: everything else may be ragged.
RAGGED = LargeSection(ffn_size=70, num_layers=5)
NORMS_FIRST = ("gpt2", "gpt_neox")


def gap(family: str, name: str, large: LargeSection, settings: OperatorSection, *, tied: bool = True) -> float:
    """Largest difference of what comes out first, at outputs of size 3. Hidden states grow by the residual map."""
    small = layer_norm_models.config_of(family, name, tied=tied)
    source = layer_norm_models.memory_of(layer_norm_models.model(family, name, tied=tied, dtype=torch.float64), small)
    grown = GrownReader(build_initial_operator(small, large, settings), source)
    for key in grown.keys():  # noqa: SIM118
        assert grown.read(key).dtype == torch.float64
        assert grown.read(key).shape == grown.info(key).shape
    ids = layer_norm_models.tokens()
    before, after = layer_norm_models.outputs(source, ids), layer_norm_models.outputs(grown, ids)
    if after.shape != before.shape:
        before = before @ grown.operator.initial_expand("residual").T
    return float((before - after).abs().max())


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("family", "name"), layer_norm_models.CLASSES)
def test_lossless_at_whole_multiples(family, name, tied, noise):
    settings = OperatorSection(noise=noise)
    assert gap(family, name, DOUBLE, settings, tied=tied) < (1e-12 if noise == 0 else 2e-6)  # noise is fp32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.is_lossless))
@pytest.mark.parametrize(("family", "name"), layer_norm_models.CLASSES)
def test_methods_called_lossless_are(family, name, method, tied):
    more = {"num_layers": 5} if family in NORMS_FIRST else {}
    large = LargeSection(hidden_size=72, ffn_size=100, num_heads=18, **more)
    assert gap(family, name, large, OperatorSection(method=method), tied=tied) < 5e-6


def test_uneven_draws_and_padded_heads_are_detected(monkeypatch):
    """Negative controls: a LayerNorm's mean and variance are lost by either."""
    padded = {"width_init": {"default": "pad", "residual": "lossless"}}
    assert gap("bert", "BertForMaskedLM", DOUBLE, OperatorSection(method="lemon", **padded), tied=False) > 0.1
    monkeypatch.setitem(initializers.WIDTH_INITS, "net2net", initializers.select)
    assert gap("gpt2", "GPT2LMHeadModel", DOUBLE, OperatorSection(method="net2net")) > 0.1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("large", [RAGGED, LargeSection(hidden_size=72, num_heads=18, num_layers=4)])
def test_lossless_depth_of_pre_norm_families(tied, large):
    assert gap("gpt2", "GPT2LMHeadModel", large, OperatorSection(), tied=tied) < 1e-6


def test_an_uncorrected_norm_of_a_tied_head_is_detected(monkeypatch):
    """Negative control: the head adds up the copies of the norm's bias, which must be divided among them."""
    monkeypatch.setattr(Operator, "divides_bias", lambda self, param: False)
    assert gap("gpt2", "GPT2LMHeadModel", DOUBLE, OperatorSection()) > 0.1
    assert gap("bert", "BertForMaskedLM", DOUBLE, OperatorSection()) > 0.1


def test_ragged_layer_norms_are_reported(caplog):
    large = LargeSection(hidden_size=32, num_heads=8)
    assert gap("gpt2", "GPT2LMHeadModel", large, OperatorSection()) > 1e-2
    assert "whole multiple" in caplog.text
    small = layer_norm_models.config_of("gpt2", "GPT2LMHeadModel")
    for section, text in ((large, "not lossless at these sizes"), (DOUBLE, "starts with the small model's logits")):
        operator = build_initial_operator(small, section, OperatorSection())
        assert text in describe_method(operator.settings, small, operator.large)


def test_refusals():
    bert, gpt2 = (
        layer_norm_models.config_of("bert", "BertForMaskedLM"),
        layer_norm_models.config_of("gpt2", "GPT2LMHeadModel"),
    )
    for settings in (OperatorSection(), OperatorSection(method="lemon")):
        with pytest.raises(ConfigError) as error:
            build_initial_operator(bert, LargeSection(num_layers=4), settings)
        assert [problem.where for problem in error.value.problems] == ["operator.depth_init"]
    with pytest.raises(ConfigError) as error:
        build_initial_operator(gpt2, LargeSection(hidden_size=48), OperatorSection())
    assert "head_dim" in error.value.problems[0].where
    build_initial_operator(bert, LargeSection(num_layers=4), OperatorSection(depth_init="stack"))


@pytest.mark.parametrize("method", ["ligo", "aki", "direct_copy", "hypercloning_noisy"])
def test_every_method_grows_every_parameter(method):
    settings = OperatorSection(method=method, depth_init="stack")
    large = LargeSection(hidden_size=48, num_heads=12, num_layers=5, vocab_size=41)
    for family, name in (("bert", "BertForPreTraining"), ("gpt2", "GPT2LMHeadModel")):
        small = layer_norm_models.config_of(family, name)
        source = layer_norm_models.memory_of(layer_norm_models.model(family, name), small)
        grown = GrownReader(build_initial_operator(small, large, settings), source)
        assert all(grown.read(key).isfinite().all() for key in grown.keys())  # noqa: SIM118
        assert layer_norm_models.outputs(grown, layer_norm_models.tokens()).shape[-1] == 41
