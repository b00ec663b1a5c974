"""Keys whose meaning is that of one class, or of one program: each against the library's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.arch import get
from megatron_ligo.arch.rope_frequencies import rotary_frequencies
from megatron_ligo.checkpoint.formats.fairscale import params_json
from megatron_ligo.checkpoint.formats.gguf import metadata_keys
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.megatron_lm import rope_arguments
from megatron_ligo.checkpoint.formats.megatron_lm.argument_parsing import _check_activation
from megatron_ligo.checkpoint.source_keys import NO_KEYS
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from tests.layer_norm_models import config_of

PHI3 = {
    "model_type": "phi3", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "tie_word_embeddings": False, "sliding_window": None,
    "hidden_act": "silu", "pad_token_id": 1,
}  # fmt: skip
ROTARY = ("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "smollm3", "phi3", "starcoder2", "mixtral")


@pytest.mark.parametrize("model_type", ROTARY)
def test_a_base_of_null_is_refused(model_type):
    with pytest.raises(CheckpointError, match="rope_theta: expected a positive number, found null"):
        config_json.parse_model_config({"model_type": model_type, "rope_theta": None}, "config.json")


@pytest.mark.parametrize(
    ("model_type", "key", "field"),
    [
        ("granite", "attention_multiplier", "attention_scale"),
        ("gemma2", "query_pre_attn_scalar", "attention_scale_dim"),
    ],
)
def test_a_scale_of_null_is_refused(model_type, key, field):
    """transformers' class refuses it; it is not the usual scale."""
    config = {**CONFIG_MAPPING[model_type]().to_dict(), key: None}
    with pytest.raises(CheckpointError, match=f"{field}: expected a positive"):
        config_json.parse_model_config(config, "config.json")


def test_a_fraction_of_null_is_refused():
    config = {"model_type": "stablelm", "partial_rotary_factor": None}
    with pytest.raises(CheckpointError, match="partial_rotary_factor: expected a number"):
        config_json.parse_model_config(config, "config.json")


@pytest.mark.parametrize("top_level", [{}, {"original_max_position_embeddings": 16}])
@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
def test_phi3_takes_its_own_length_and_names(name, top_level):
    factors = {"short_factor": [1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0], "original_max_position_embeddings": 8}
    config = PHI3 | {"rope_scaling": {"type": name, **factors}} | top_level
    ours = config_json.parse_model_config(config, "config.json")
    theirs = Phi3Config(**{key: value for key, value in config.items() if key != "model_type"})
    assert theirs.rope_parameters["rope_type"] == "longrope"
    for length in (4, 40, 5000):
        expected, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
        computed = rotary_frequencies(ours, length)
        assert torch.allclose(computed, expected, rtol=1e-6), length
        assert ours.rope_scaling["attention_factor"] == pytest.approx(factor)


def test_phi3s_longrope_is_written_as_transformers_4_takes_it():
    """Its class there refuses a scaling of other than three keys; a factor that lengths do not give needs more."""
    factors = {"short_factor": [1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0]}
    config = PHI3 | {"rope_scaling": {"type": "su", **factors}, "original_max_position_embeddings": 16}
    ours = config_json.parse_model_config(config, "config.json")
    written = config_json.to_hf_config(ours, {}, torch.float32)
    assert written["rope_scaling"] == {"type": "longrope", **factors}
    assert config_json.parse_model_config(written, "config.json") == ours
    theirs = Phi3Config(**{key: value for key, value in written.items() if key != "model_type"})
    assert ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=9)[1] == ours.rope_scaling["attention_factor"] > 1
    stated = replace(ours, rope_scaling={**ours.rope_scaling, "attention_factor": 1.5})
    written = config_json.to_hf_config(stated, {}, torch.float32)
    assert written["rope_scaling"]["attention_factor"] == 1.5
    assert config_json.parse_model_config(written, "config.json") == stated


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "proportional"])
def test_phi3_takes_no_other_scaling(kind):
    with pytest.raises(CheckpointError, match="rope_scaling: expected one of default, longrope"):
        config_json.parse_model_config(PHI3 | {"rope_scaling": {"rope_type": kind, "factor": 2.0}}, "config.json")


def test_the_length_of_phi3_is_its_classs():
    assert get("phi3").original_length == Phi3Config().original_max_position_embeddings


def test_windows_of_no_length_are_refused():
    with pytest.raises(CheckpointError, match="sliding_window: expected a number of tokens"):
        config_json.parse_model_config({"model_type": "gemma2", "sliding_window": None}, "config.json")


def test_granites_switch_of_rotary_positions_must_be_on():
    errors = ErrorCollector("metadata", CheckpointError)
    metadata = {"granite.rope.scaling.finetuned": False, "llama.rope.scaling.finetuned": False}
    metadata_keys.check_keys({"llama.rope.scaling.finetuned": False}, get("llama"), "llama", NO_KEYS, errors)
    assert not errors.problems
    metadata_keys.check_keys(metadata, get("granite"), "granite", NO_KEYS, errors)
    assert "granite.rope.scaling.finetuned" in str(errors.problems[0])


def test_transformer_engines_gelu_is_by_tanh():
    errors = ErrorCollector("arguments", CheckpointError)
    values = {"bias_gelu_fusion": False, "use_te_activation_func": True}
    _check_activation(values, get("gpt2"), config_of("gpt2", "GPT2LMHeadModel", activation="gelu_new"), errors)
    assert not errors.problems
    _check_activation(values, get("gpt2"), config_of("gpt2", "GPT2LMHeadModel", activation="gelu"), errors)
    assert errors.problems


@pytest.mark.parametrize(("factor", "is_refused"), [(4.0, True), (8.0, False), (1.0, False)])
def test_a_factor_without_its_switch_is_refused(factor, is_refused):
    """epfLLM's fork scales linearly by it; Megatron-LM states its default, 8, where nothing is scaled."""
    errors = ErrorCollector("arguments", CheckpointError)
    rope_arguments.check_rope_args({"use_rope_scaling": False, "rope_scaling_factor": factor}, errors)
    assert bool(errors.problems) is is_refused


def test_mistrals_params_json_must_state_its_base(tmp_path):
    path = tmp_path / "params.json"
    path.write_text(
        '{"dim": 24, "n_layers": 2, "head_dim": 4, "hidden_dim": 32, "n_heads": 6, "n_kv_heads": 3, "norm_eps": 1e-5,'
        ' "vocab_size": 37}'
    )
    with pytest.raises(CheckpointError, match="rope_theta"):
        params_json.load_params(path)


RELEASED = {
    "starcoder2": {"mlp_type": "default", "norm_type": "layer_norm", "rms_norm_eps": 1e-5, "use_bias": True},
    "phi3": {"full_attn_mod": 1, "interpolate_factor": 1, "partial_rotary_factor": 0.75},
}


@pytest.mark.parametrize("model_type", RELEASED)
def test_keys_of_released_configs_are_known(model_type):
    config_json.parse_model_config({"model_type": model_type, **RELEASED[model_type]}, "config.json")
