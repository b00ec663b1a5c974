"""Families whose layers differ, or whose files or positions differ from Llama's: held by transformers' own classes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_ligo.arch.flops import forward_flops
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth import layer_kinds
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import build_initial_operator
from tests import layer_norm_models, layer_pattern_models
from tests.checkpoint.hf_models import assert_same
from tests.layer_pattern_models import GROWTH, OWN, PATTERNS, RAGGED
from tests.tiny_models import tokens

LOSSLESS = [name for name, method in METHODS.items() if method.is_lossless]


def grown_logits(case: str, tmp_path, method: str = "lossless", tied: bool = False, **keys):
    """The logits of the small model and of the grown one, as transformers loads its folder. fp32, eager attention."""
    small = layer_pattern_models.config_of(case, tied=tied)
    network = layer_norm_models.model_of(small)
    source = layer_norm_models.memory_of(network, small)
    settings = OperatorSection(method=method, **keys)
    grown = GrownReader(build_initial_operator(small, LargeSection(**GROWTH[case]), settings), source)
    convert(grown, tmp_path / "grown", "hf")
    large = type(network).from_pretrained(tmp_path / "grown", attn_implementation="eager").eval()
    network.set_attn_implementation("eager")
    ids = tokens(small)
    with torch.no_grad():
        return network(ids).logits, large(ids).logits, grown


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", OWN)
def test_growth_is_lossless(tmp_path, case, tied):
    before, after, _ = grown_logits(case, tmp_path, tied=tied)
    assert 0.5 < float(before.abs().max()) < 12
    assert float((before - after).abs().max()) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize("method", LOSSLESS)
@pytest.mark.parametrize("case", OWN)
def test_methods_called_lossless_are(tmp_path, case, method):
    before, after, _ = grown_logits(case, tmp_path, method)
    assert float((before - after).abs().max()) < 2e-5


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("case", ["smollm3 with windows", "phi3", "starcoder2", "opt", "modernbert", "falcon"])
def test_every_method_grows_every_parameter(case, method):
    small = layer_pattern_models.config_of(case)
    source = layer_norm_models.memory_of(layer_norm_models.model_of(small), small)
    large = LargeSection(**(GROWTH[case] if case in ("opt", "modernbert", "falcon") else RAGGED))
    settings = OperatorSection(method=method, depth_init="stack" if method == "ligo" else None)
    grown = GrownReader(build_initial_operator(small, large, settings), source)
    for key in grown.keys():  # noqa: SIM118 - no dict
        assert grown.read(key).isfinite().all()
        assert grown.read(key).shape == grown.info(key).shape


@pytest.mark.parametrize("case", PATTERNS)
@pytest.mark.parametrize("depth", ["lossless", "stack", "copy"])
def test_kinds_follow_the_depth_map(case, depth):
    small = layer_pattern_models.config_of(case)
    operator = build_initial_operator(small, LargeSection(**GROWTH[case]), OperatorSection(depth_init=depth))
    sources = {"lossless": [0, 0, 1, 1, 2], "stack": [0, 1, 2, 0, 1], "copy": [0, 1, 2, 2, 2]}[depth]
    assert layer_kinds.layer_kinds(operator.large) == [small.layer_kind(source) for source in sources]


def test_kinds_that_stay_behind_are_seen(tmp_path, monkeypatch):
    """Negative control: the kinds of another depth map are not those of the layers."""
    every_fifth = {"rope_layers": (True, True, True, True, False)}
    monkeypatch.setattr(layer_kinds, "follow_depth", lambda operator: replace(operator.large, **every_fifth))
    before, after, _ = grown_logits("smollm3", tmp_path)
    assert float((before - after).abs().max()) > 1e-2


@pytest.mark.parametrize("keys", [{"method": "ligo"}, {"depth_init": {"default": "lossless", "q": "stack"}}])
def test_a_mix_of_unlike_layers_is_refused(keys):
    with pytest.raises(ConfigError) as error:
        build_initial_operator(
            layer_pattern_models.config_of("smollm3"), LargeSection(**RAGGED), OperatorSection(**keys)
        )
    (problem,) = error.value.problems
    assert "operator.depth_init" in problem.where
    assert "without rotary positions" in problem.found


@pytest.mark.parametrize("case", OWN)
def test_there_and_back(tmp_path, case):
    """By way of every format that can state the model; the others refuse it by name."""
    small = layer_pattern_models.config_of(case, tied=case == "modernbert")
    network = layer_norm_models.model_of(small)
    network.save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    assert source.model_config == small
    unsayable = "position_offset" if case == "opt" else "window_rope_base" if small.has_window_positions else ""
    unsayable = "biases" if case in ("olmo2 with biases", "cohere with biases", "arcee") else unsayable
    unsayable = "query_scaling_beta" if small.query_scaling_beta else unsayable
    unsayable = "attention_chunk" if case == "llama4_text with biases" else unsayable
    for to in ("universal", "fsdp", "mcore", "megatron"):
        if unsayable and to not in ("universal", "fsdp"):
            with pytest.raises(CheckpointError, match=unsayable):
                convert(source, tmp_path / to, to)
            continue
        convert(source, tmp_path / to, to)
        assert_same(source, formats.open(tmp_path / to))
    with pytest.raises((CheckpointError, ConfigError), match=r"fairscale|Meta's"):
        convert(source, tmp_path / "meta", "fairscale")
    convert(formats.open(tmp_path / "universal"), tmp_path / "b", "hf")
    assert_same(source, formats.open(tmp_path / "b"))
    again = type(network).from_pretrained(tmp_path / "b").eval()
    ids = tokens(small)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, network(ids).logits)


def test_what_megatron_s_arguments_say(tmp_path):
    small = layer_pattern_models.config_of("smollm3 with windows")
    layer_norm_models.model_of(small).save_pretrained(tmp_path / "a")
    convert(formats.open(tmp_path / "a"), tmp_path / "m", "mcore")
    args = formats.open(tmp_path / "m").run_arguments
    assert (args["window_size"], args["window_attn_skip_freq"], args["no_rope_freq"]) == ((4, 0), [0, 1, 0], [1, 0, 0])
    assert (args["normalization"], args["rotary_base"]) == ("RMSNorm", 10000)


def test_the_written_keys_state_the_patterns(tmp_path):
    _, _, grown = grown_logits("smollm3", tmp_path)
    config = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert config["no_rope_layers"] == [1, 1, 0, 0, 1]
    assert (config["use_sliding_window"], config["layer_types"]) == (False, ["full_attention"] * 5)
    assert formats.open(tmp_path / "grown").model_config == grown.model_config


@pytest.mark.parametrize("case", ["olmo3", "gemma3"])
def test_a_model_may_have_no_window_at_all(tmp_path, case):
    small = replace(layer_pattern_models.config_of(case), sliding_window=None)
    network = layer_norm_models.model_of(small)
    network.save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    assert source.model_config == small
    with torch.no_grad():
        assert torch.equal(layer_norm_models.outputs(source, tokens(small)), network(tokens(small)).logits)


def test_positions_of_one_base_go_through_megatron_s_formats(tmp_path):
    small = replace(layer_pattern_models.config_of("olmo3"), rope_scaling=None)
    assert not small.has_window_positions
    layer_norm_models.model_of(small).save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    assert source.model_config == small
    convert(source, tmp_path / "m", "mcore")
    assert_same(source, formats.open(tmp_path / "m"))


@pytest.mark.parametrize("case", ["smollm3", "phi3", "starcoder2", "opt", "olmo3", "gemma3", "modernbert", "phi"])
def test_count_of_flops_equals_torch(case):
    small = layer_pattern_models.config_of(case)
    network = layer_norm_models.model_of(small)
    network.set_attn_implementation("eager")
    ids = tokens(small, batch=2, length=32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(ids)
    assert forward_flops(small, ids.numel(), 32) == pytest.approx(counter.get_total_flops(), rel=0.02)
