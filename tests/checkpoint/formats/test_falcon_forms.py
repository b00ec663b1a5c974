"""Falcon's configs state one network in several ways: transformers' own class says which."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from tests import layer_norm_models
from tests.checkpoint.perturbed_decoders import FALCON

# The keys, and the number of key and value heads and of norms that they mean.
FORMS = {
    "7B": ({"multi_query": True, "num_kv_heads": 4}, 1, 1),
    "multi-head": ({"multi_query": False}, 4, 1),
    "40B": ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2, 2),
    "11B": ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, 2, 1),
    "all heads": ({"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "bias": True}, 4, 2),
}


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_read_and_written_as_the_newer_one(tmp_path, name):
    keys, num_kv_heads, num_norms = FORMS[name]
    torch.manual_seed(0)
    network = layer_norm_models._random(transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON, **keys)))
    network.eval().save_pretrained(tmp_path / "a")
    source = formats.open(tmp_path / "a")
    assert (source.model_config.num_kv_heads, source.model_config.num_parallel_norms) == (num_kv_heads, num_norms)
    convert(source, tmp_path / "b", "hf")
    again = transformers.FalconForCausalLM.from_pretrained(tmp_path / "b").eval()
    ids = layer_norm_models.tokens()
    with torch.no_grad():
        assert float((again(ids).logits - network(ids).logits).abs().max()) < 1e-6


@pytest.mark.parametrize("keys", [{"alibi": True}, {"parallel_attn": False}, {"num_ln_in_parallel_attn": 3}])
def test_other_networks_are_refused_by_name(tmp_path, keys):
    network = transformers.FalconForCausalLM(transformers.FalconConfig(**FALCON))
    network.save_pretrained(tmp_path)
    form = {"new_decoder_architecture": True, "num_kv_heads": 1}
    config = transformers.FalconConfig(**{**FALCON, **form, "num_ln_in_parallel_attn": 1, **keys})
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"alibi|parallel_attn|num_parallel_norms"):
        formats.open(tmp_path)
