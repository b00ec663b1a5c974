"""Our names in Megatron-core's files against those of Megatron-Bridge (0.7.0), which its models declare.

The facts: for each family, the tensor of a Megatron model, and the tensors of Hugging Face's files that it holds, in
order. Megatron-Bridge cannot be installed beside the other libraries here. It has none for Llama 4's text model,
Granite with windows, Seed-OSS, GLM-4 without experts, Cohere 2 and VaultGemma.
"""

from __future__ import annotations

import pytest

from megatron_ligo.arch import get
from megatron_ligo.arch.mcore_names import to_local_name
from megatron_ligo.arch.spec import Pack
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests import decoder_models, layer_pattern_models
from tests.tiny_models import llama_config

LAYER, HF_LAYER = "decoder.layers.0.", "model.layers.0."
OUTSIDE = {
    "embedding.word_embeddings.weight": ["model.embed_tokens.weight"],
    "output_layer.weight": ["lm_head.weight"],
    "decoder.final_layernorm.weight": ["model.norm.weight"],
}
QKV = {"self_attention.linear_qkv.weight": [f"self_attn.{name}_proj.weight" for name in "qkv"]}
QKV_BIAS = {"self_attention.linear_qkv.bias": [f"self_attn.{name}_proj.bias" for name in "qkv"]}
OUTPUTS = {
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "mlp.linear_fc2.weight": ["mlp.down_proj.weight"],
}
GATED = {"mlp.linear_fc1.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]}
INPUT_NORM = {"self_attention.linear_qkv.layer_norm_weight": ["input_layernorm.weight"]}
FFN_NORM = {"mlp.linear_fc1.layer_norm_weight": ["post_attention_layernorm.weight"]}
HEAD_NORMS = {f"self_attention.{name}_layernorm.weight": [f"self_attn.{name}_norm.weight"] for name in "qk"}
OUTPUT_NORMS = {
    "self_attention.linear_proj.post_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.linear_fc2.post_layernorm.weight": ["post_feedforward_layernorm.weight"],
}
GEMMA_FFN_NORM = {"mlp.linear_fc1.layer_norm_weight": ["pre_feedforward_layernorm.weight"]}
LLAMA = {**QKV, **OUTPUTS, **GATED, **INPUT_NORM, **FFN_NORM}
# LayerNorms of the stream, and a feed-forward block without a gate.
NEMOTRON = {
    **QKV,
    **OUTPUTS,
    **INPUT_NORM,
    **FFN_NORM,
    "self_attention.linear_qkv.layer_norm_bias": ["input_layernorm.bias"],
    "mlp.linear_fc1.layer_norm_bias": ["post_attention_layernorm.bias"],
    "mlp.linear_fc1.weight": ["mlp.up_proj.weight"],
}
FINAL_BIAS = {"nemotron": {"decoder.final_layernorm.bias": ["model.norm.bias"]}}
EXPERTS = {
    f"mlp.experts.local_experts.{expert}.{linear}.weight": [f"mlp.experts.{expert}.{name}.weight" for name in names]
    for expert in range(2)
    for linear, names in {"linear_fc1": ("gate_proj", "up_proj"), "linear_fc2": ("down_proj",)}.items()
}
MIXTURE = {
    **QKV,
    **INPUT_NORM,
    **HEAD_NORMS,
    "self_attention.linear_proj.weight": ["self_attn.o_proj.weight"],
    "pre_mlp_layernorm.weight": ["post_attention_layernorm.weight"],
    "mlp.router.weight": ["mlp.gate.weight"],
    **EXPERTS,
}
OF_A_LAYER = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": {**LLAMA, **QKV_BIAS},
    "qwen3": {**LLAMA, **HEAD_NORMS},
    "gemma": LLAMA,
    "gemma2": {**QKV, **OUTPUTS, **GATED, **INPUT_NORM, **GEMMA_FFN_NORM, **OUTPUT_NORMS},
    "gemma3_text": {**QKV, **OUTPUTS, **GATED, **INPUT_NORM, **GEMMA_FFN_NORM, **OUTPUT_NORMS, **HEAD_NORMS},
    "ministral3": LLAMA,
    "ernie4_5": LLAMA,
    "nemotron": NEMOTRON,
    "exaone4": {**QKV, **OUTPUTS, **GATED, **OUTPUT_NORMS, **HEAD_NORMS},
    "qwen3_moe": MIXTURE,
    "olmoe": MIXTURE,
}
# Its own linears hold the norms after the blocks; Megatron-core's layers hold them themselves, and so do our files.
MOVED = {
    "self_attention.linear_proj.post_layernorm.": "post_self_attn_layernorm.",
    "mlp.linear_fc2.post_layernorm.": "post_mlp_layernorm.",
}
CASES = {"gemma3_text": "gemma3"}


def config_of(model_type: str):
    if model_type in ("llama", "mistral", "qwen2"):
        return llama_config(model_type=model_type, qkv_bias=model_type == "qwen2", tied=False)
    if model_type in ("qwen3_moe", "olmoe"):
        return llama_config(arch=model_type, model_type=model_type, tied=False, num_experts=2, top_k=1)
    if model_type == "nemotron":
        biases = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias"), False)
        return layer_pattern_models.config_of(model_type, tied=False, **biases)
    if model_type in decoder_models.OWN:
        return decoder_models.config_of(model_type, tied=False)
    return layer_pattern_models.config_of(CASES.get(model_type, model_type), tied=False)


def to_our_name(name: str) -> str:
    for theirs, ours in MOVED.items():
        name = name.replace(theirs, ours)
    return to_local_name(name)


@pytest.mark.parametrize("model_type", OF_A_LAYER)
def test_names_and_parts_are_those_of_megatron_bridge(model_type):
    model_config = config_of(model_type)
    arch = get(model_config.arch)
    expected = {name: list(parts) for name, parts in {**OUTSIDE, **FINAL_BIAS.get(model_type, {})}.items()}
    for name, parts in OF_A_LAYER[model_type].items():
        expected[to_our_name(LAYER + name)] = [HF_LAYER + part for part in parts]
    ours = {
        name: [arch.stored_name(key, model_config, "hf") for key in item.keys]
        for name, item in stored_tensors(arch, model_config, "mcore").items()
        if ".layers." not in name or name.startswith(LAYER)
    }
    assert ours == expected


@pytest.mark.parametrize("model_type", OF_A_LAYER)
def test_fused_tensors_are_packed_as_megatron_bridge_packs_them(model_type):
    """Query heads, key and value of one KV group after another's; all of the gate, then all of up."""
    model_config = config_of(model_type)
    for name, item in stored_tensors(get(model_config.arch), model_config, "mcore").items():
        if "linear_qkv.weight" in name:
            rows = (model_config.num_heads + 2 * model_config.num_kv_heads) * model_config.head_dim
            assert (item.pack, item.shape(model_config)) == (Pack.GROUPED, (rows, model_config.hidden_size))
        elif "linear_fc1.weight" in name:
            is_gated = get(model_config.arch).is_gated(model_config)
            assert item.pack is (Pack.STACKED if is_gated else Pack.NONE)
            assert item.shape(model_config) == ((1 + is_gated) * model_config.ffn_size, model_config.hidden_size)
