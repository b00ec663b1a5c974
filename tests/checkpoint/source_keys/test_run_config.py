"""Megatron-Bridge's run_config.yaml: sizes without a config.json, and what must not be read from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint import hf_models

PROVIDERS = "megatron.bridge.models."
# What Megatron-Bridge 0.3.1 writes of a provider, without the keys whose value is empty.
DEFAULTS = {
    "_target_": f"{PROVIDERS}gpt_provider.GPTModelProvider",
    "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
    "add_bias_linear": False,
    "apply_rope_fusion": True,
    "attention_backend": {"_target_": "megatron.core.transformer.enums.AttnBackend", "_args_": [5], "_call_": True},
    "bias_activation_fusion": True,
    "config_logger_dir": "",
    "cuda_graph_scope": "full",
    "fp8_recipe": "delayed",
    "gated_linear_unit": True,
    "glu_linear_offset": 0.0,
    "init_method_std": 0.02,
    "make_vocab_size_divisible_by": 128,
    "moe_layer_freq": 1,
    "moe_router_topk": 2,
    "mtp_enabled": False,
    "normalization": "RMSNorm",
    "params_dtype": {"_target_": "torch.float32", "_call_": False},
    "position_embedding_type": "rope",
    "rope_scaling": False,
    "rope_scaling_factor": 1.0,
    "rotary_percent": 1.0,
    "should_pad_vocab": False,
    "softmax_type": "vanilla",
    "transformer_impl": "transformer_engine",
    "transformer_layer_spec": {"_target_": f"{PROVIDERS}gpt_provider.default_layer_spec", "_call_": False},
    "window_size": None,
}


def fields(folder: Path) -> dict:
    """Returns the section `model` of the model in a Hugging Face folder."""
    config = formats.open(folder).model_config
    scaling = config.rope_scaling or {}
    return {
        **DEFAULTS,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "vocab_size": config.vocab_size,
        "seq_length": config.max_positions,
        "layernorm_epsilon": config.norm_eps,
        "share_embeddings_and_output_weights": config.tied,
        "add_qkv_bias": config.qkv_bias,
        "rotary_base": int(config.rope_base),
        "rope_scaling": bool(scaling),
        "rope_scaling_factor": scaling.get("factor", 1.0),
        "window_size": config.sliding_window and [config.sliding_window - 1, 0],
    }


@pytest.fixture
def bridge(tmp_path):
    """Returns a function that writes a checkpoint without arguments, with the given fields or text beside it."""

    def write(section: dict | str, model_type: str = "llama", **changes) -> Path:
        _, hf = hf_models.saved(tmp_path / "hf", model_type, **changes)
        shutil.rmtree(tmp_path / "mcore", ignore_errors=True)
        convert(formats.open(hf), tmp_path / "mcore", "mcore")
        (tmp_path / "mcore" / "dims.json").unlink()
        torch.save({"checkpoint_version": 3.0}, tmp_path / "mcore" / "release" / "common.pt")
        text = section if isinstance(section, str) else yaml.safe_dump({"model": {**fields(hf), **section}})
        (tmp_path / "mcore" / "release" / "run_config.yaml").write_text(text)
        return tmp_path / "mcore"

    return write


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192


@pytest.mark.parametrize("model_type, target, changes", [
    ("llama", "llama.llama_provider.LlamaModelProvider", {"tied": True}),
    ("llama", "llama.llama_provider.Llama32ModelProvider1B", {"rope_scaling": LLAMA3}),
    ("mistral", "mistral.mistral_provider.MistralModelProvider", {"sliding_window": 12}),
    ("qwen2", "qwen.qwen_provider.Qwen2ModelProvider500M", {}),
    ("llama", "gpt_provider.GPTModelProvider", {}),
])  # fmt: skip
def test_a_checkpoint_of_bridge_opens_without_a_config(bridge, tmp_path, model_type, target, changes):
    folder = bridge({"_target_": PROVIDERS + target}, model_type, **changes)
    hf_models.assert_same(formats.open(tmp_path / "hf"), formats.open(folder))
    shutil.copy(tmp_path / "hf" / "config.json", folder)
    # The length of the run's samples is not the model's.
    section = {**fields(tmp_path / "hf"), "seq_length": 16}
    (folder / "release" / "run_config.yaml").write_text(yaml.safe_dump({"model": section}))
    hf_models.assert_same(formats.open(tmp_path / "hf"), formats.open(folder))


def test_fields_of_a_nested_transformer_config(bridge, tmp_path):
    folder = bridge({})
    model = fields(tmp_path / "hf")
    outer = ("vocab_size", "seq_length", "share_embeddings_and_output_weights", "position_embedding_type")
    target = "megatron.core.transformer.transformer_config.TransformerConfig"
    nested = {"_target_": target, **{name: value for name, value in model.items() if name not in ("_target_", *outer)}}
    model = {"_target_": "megatron.training.models.gpt.GPTModelConfig", "transformer": nested}
    model |= {name: fields(tmp_path / "hf")[name] for name in outer}
    (folder / "release" / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    hf_models.assert_same(formats.open(tmp_path / "hf"), formats.open(folder))


def test_nemo_states_its_model_beside_the_weights(bridge, tmp_path):
    """Llama 3.1's classes state their scaling in fields of their own, as those of Megatron-Bridge 0.2 do."""
    folder = bridge({}, rope_scaling=LLAMA3)
    model = {**fields(tmp_path / "hf"), "rope_scaling": False, "rope_scaling_factor": 1.0}
    own = {"scale_factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    base = "nemo.collections.llm.gpt.model."
    model |= {"_target_": f"{base}llama.Llama32Config1B", **own}
    model["transformer_layer_spec"] = {"_target_": f"{base}base.default_layer_spec", "_call_": False}
    (folder / "release" / "run_config.yaml").unlink()
    (folder / "release").rename(folder / "weights")
    (folder / "context").mkdir()
    path = folder / "context" / "model.yaml"
    path.write_text(yaml.safe_dump({"_target_": f"{base}llama.LlamaModel", "config": model}))
    hf_models.assert_same(formats.open(tmp_path / "hf"), formats.open(folder / "weights"))
    for name, value in {"old_context_len": 4096, "_target_": f"{base}llama.Llama4Config"}.items():
        path.write_text(yaml.safe_dump({"config": {**model, name: value}}))
        with pytest.raises(CheckpointError) as error:
            formats.open(folder / "weights")
        assert name in error.value.problems[0].where


@pytest.mark.parametrize("section, where", [
    ({"_target_": f"{PROVIDERS}qwen.qwen_provider.Qwen3ModelProvider8B"}, "_target_"),
    ({"_target_": "my.models.Provider"}, "_target_"),
    ({"_target_": 3}, "_target_"),
    ({"scale_factor": 8.0, "old_context_len": 8192}, "scale_factor"),
    ({"qk_layernorm": True}, "layernorm"),
    ({"no_rope_freq": 4}, "no_rope_freq"),
    ({"softmax_type": "learnable"}, "softmax_type"),
    ({"transformer_layer_spec": {"_target_": "my.layers.spec", "_call_": False}}, "transformer_layer_spec"),
    ({"activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False}}, "activation_func"),
    ({"num_moe_experts": 8}, "experts"),
    ({"vocab_size": None}, "vocab_size or padded_vocab_size"),
    ({"kv_channels": "10"}, "head_dim"),
])  # fmt: skip
@pytest.mark.parametrize("beside", ["", "config.json"])
def test_fields_of_another_network_are_refused(bridge, tmp_path, section, where, beside):
    folder = bridge(section)
    if beside:
        shutil.copy(tmp_path / "hf" / "config.json", folder)
        if section.get("vocab_size", 0) is None:
            assert formats.open(folder).model_config == formats.open(tmp_path / "hf").model_config
            return
    with pytest.raises(CheckpointError) as error:
        formats.open(folder)
    assert any(where in problem.where.rpartition(": ")[2] for problem in error.value.problems)


ALIASES = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))


@pytest.mark.parametrize("text", [
    "model: [1, 2]", "train: {}", "", "model: {1: 2}", "model: {a: [}", "model: {num_layers: 4, num_layers: 5}",
    "model: !!python/object/apply:os.system ['true']", f"{ALIASES}model:\n  new: *a8\n", "\0", "[" * 5000,
])  # fmt: skip
def test_damaged_files_are_refused(bridge, text):
    with pytest.raises(CheckpointError) as error:
        formats.open(bridge(text))
    assert "run_config.yaml" in str(error.value)
