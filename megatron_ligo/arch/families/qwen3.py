"""Qwen3: Llama with an RMSNorm of each query and key head before the rotation.

A grown head is a copy of a small one, so these norms are copied. All norms of a config have one eps, so the residual
stream keeps its mean square: E^T E = c I with c = D2 / D1, eps x c D1 / D2 = eps, at any ratio (a tied contract, which
reads with E^T, wants c = 1, and eps x D1 / D2). The head size may grow too: features keep their mean square, and gains
undo the factors that this takes (growth/attention_heads.py).
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import HEAD_FEATURE_GAIN
from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import (
    ATTENTION_BIAS,
    ATTENTION_BIASES,
    LLAMA,
    OUTPUT_FOLLOWS,
    PLAIN_FIELDS,
    params_with,
)
from megatron_ligo.arch.spec import FormatLocation, ParamSpec, Role


def _head_norm(key: str, role: Role, hf: str, mcore: str, gguf: str) -> ParamSpec:
    locations = {
        "hf": FormatLocation(f"model.layers.{{}}.self_attn.{hf}.weight"),
        "mcore": FormatLocation(f"decoder.layers.{{}}.self_attention.{mcore}.weight"),
        "gguf": FormatLocation(f"blk.{{}}.{gguf}.weight"),
    }
    # Replicated, but each tensor-parallel rank normalises its own heads.
    return ParamSpec(key, role, (HEAD_FEATURE_GAIN,), None, locations, partial_tp_use=True)


QUERY_NORM = _head_norm("layers.{}.q_norm", Role.QUERY_NORM, "q_norm", "q_layernorm", "attn_q_norm")
KEY_NORM = _head_norm("layers.{}.k_norm", Role.KEY_NORM, "k_norm", "k_layernorm", "attn_k_norm")

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    model_types={"qwen3": {"Qwen3ForCausalLM": ()}},
    own_head_dim=True,
    params=(
        *without_format(params_with(*ATTENTION_BIASES), "fairscale"),
        QUERY_NORM,
        KEY_NORM,
    ),
    hf_fields=PLAIN_FIELDS | ATTENTION_BIAS,
    coupled_fields={"qwen3": OUTPUT_FOLLOWS},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={"qwen3": LLAMA.hf_pattern_keys["qwen2"]},
    implied_sizes={},
    expert_types={"qwen3": "qwen3_moe"},
)
