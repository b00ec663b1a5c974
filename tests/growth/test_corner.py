"""The corner start: its block, its zeros and the scales of its random numbers, looked at in the grown weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests import image_models, layer_norm_models
from tests.growth.logit_gap import logits_gap
from tests.tiny_models import hf_llama, llama_config, memory_of

WIDER = LargeSection(num_layers=5, hidden_size=120, ffn_size=150, num_heads=30, num_kv_heads=15)
READERS, WRITERS = ("q", "k", "v", "gate", "up"), ("o", "down")


def grown(tied: bool = True, large: LargeSection = WIDER, method: str = "corner", **keys) -> tuple[GrownReader, object]:
    small = llama_config(tied=tied)
    source = memory_of(hf_llama(small), small)
    return GrownReader(build_initial_operator(small, large, OperatorSection(method=method, **keys)), source), source


def spread(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("tied", [True, False])
def test_zeros_and_scales_are_those_of_the_rule(tied):
    reader, source = grown(tied, fresh_scale={"default": 1.0, "embedding": 2.0, "ffn": 0.5})
    small, large = reader.operator.small, reader.operator.large
    d1, d2 = small.hidden_size, large.hidden_size
    for layer in range(5):
        origin = layer % small.num_layers
        for name in READERS:
            weight, before = reader.read(f"layers.{layer}.{name}"), source.read(f"layers.{origin}.{name}")
            rows = len(before)
            assert torch.equal(weight[:rows, :d1], before)
            assert not weight[:, d1:].any(), "nobody reads new residual features"
            expected = d2**-0.5 * (0.5 if name in ("gate", "up") else 1)
            assert spread(weight[rows:, :d1]) == pytest.approx(expected, rel=0.1)
        for name in WRITERS:
            weight, before = reader.read(f"layers.{layer}.{name}"), source.read(f"layers.{origin}.{name}")
            columns = before.shape[1]
            assert torch.equal(weight[:d1, :columns], before)
            assert not weight[:, columns:].any(), "nobody reads new heads and neurons"
            assert spread(weight[d1:, :columns]) == pytest.approx((weight.shape[1] * 2 * 5) ** -0.5, rel=0.1)
        gain, before = reader.read(f"layers.{layer}.norm1"), source.read(f"layers.{origin}.norm1")
        keep = (d1 / d2) ** 0.5
        assert torch.allclose(gain[:d1], before * keep) and torch.allclose(gain[d1:], before.mean() * keep)
    embed = reader.read("embed")
    assert torch.equal(embed[:, :d1], source.read("embed"))
    assert spread(embed[:, d1:]) == pytest.approx(2 * d2**-0.5, rel=0.1)
    if not tied:
        assert not reader.read("head")[:, d1:].any()
    assert large.norm_eps == pytest.approx(small.norm_eps * d1 / d2)


def test_each_number_depends_on_the_seed_and_the_key():
    first, again, other = (grown(seed=seed)[0] for seed in (1, 1, 2))
    keys = ("embed", "layers.1.down", "layers.4.down", "layers.1.up")
    assert all(torch.equal(first.read(key), again.read(key)) for key in keys)
    assert not any(torch.equal(first.read(key), other.read(key)) for key in keys)
    new = [first.read(key)[64:, :24].flatten()[:400] for key in keys[1:]]
    assert not torch.equal(new[0], new[1])


def test_layers_that_write_nothing():
    reader, _ = grown(depth_init="lossless")
    idle = [
        not reader.read(f"layers.{layer}.o").any() and not reader.read(f"layers.{layer}.down").any()
        for layer in range(5)
    ]
    assert idle == [False, True, False, True, False]
    assert reader.read("layers.1.up").any()


def test_the_quiet_corner_nearly_keeps_the_logits():
    """The gap of new features written a hundred times smaller, at logits of size 5, tied or not."""
    quiet = OperatorSection(method="corner_quiet")
    for tied in (True, False):
        gap = logits_gap(llama_config(tied=tied), WIDER, quiet)
        assert 1e-7 < gap < 3e-3
        loud = replace(quiet, fresh_scale=1.0)
        assert logits_gap(llama_config(tied=tied), WIDER, loud) > 10 * gap


FAMILIES = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_norm_families(family):
    small = layer_norm_models.config_of(family, FAMILIES[family])
    source = layer_norm_models.memory_of(layer_norm_models.model(family, FAMILIES[family]), small)
    large = LargeSection(hidden_size=2 * small.hidden_size, ffn_size=100, num_heads=2 * small.num_heads, num_layers=5)
    reader = GrownReader(build_initial_operator(small, large, OperatorSection(method="corner")), source)
    d1 = small.hidden_size
    assert spread(reader.read("embed")[:, d1:]) == pytest.approx((2 * d1) ** -0.5, rel=0.2)
    for key in ("layers.1.o_bias", "layers.1.down_bias", "layers.1.norm1_bias"):
        assert not reader.read(key)[d1:].any()
    assert not reader.read("layers.1.up")[:, d1:].any()
    outputs = layer_norm_models.outputs(reader, layer_norm_models.tokens())
    assert bool(torch.isfinite(outputs).all())
    if family == "gpt2":
        assert spread(reader.read("positions")[:, d1:]) == pytest.approx((2 * d1) ** -0.5, rel=0.2)


def test_an_image_classifier():
    small = image_models.image_config("vit")
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small), small)
    large = LargeSection(hidden_size=2 * small.hidden_size, num_heads=2 * small.num_heads)
    reader = GrownReader(build_initial_operator(small, large, OperatorSection(method="corner")), source)
    patch, d1 = reader.read("patch"), small.hidden_size
    assert torch.equal(patch[:d1], source.read("patch"))
    assert spread(patch[d1:]) == pytest.approx((2 * d1 * patch[0].numel()) ** -0.5, rel=0.2)
    assert reader.read("class_token")[d1:].any() and not reader.read("patch_bias")[d1:].any()


def test_what_has_no_corner_is_refused_by_name(tmp_path):
    bert = layer_norm_models.config_of("bert", "BertForMaskedLM")
    llama = llama_config()
    for small, keys, where in (
        (bert, {"method": "corner"}, "operator.fresh"),
        (llama, {"method": "stack", "codes": f"{tmp_path}"}, "operator.codes"),
        (llama, {"method": "corner", "fresh_scale": {"default": 1.0, "ffm": 1.0}}, "operator.fresh_scale.ffm"),
        (llama, {"method": "stack", "fresh_scale": 2.0}, "operator.fresh_scale"),
        (llama, {"method": "corner", "noise": 0.5}, "operator.noise (residual)"),
    ):
        large = LargeSection(hidden_size=2 * small.hidden_size, num_heads=2 * small.num_heads)
        with pytest.raises(ConfigError) as error:
            build_initial_operator(small, large, OperatorSection(**keys))
        assert where in [problem.where for problem in error.value.problems]
