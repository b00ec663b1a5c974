"""Llama 4's text model without experts (MobileLLM-R1): layers that attend in chunks or to all tokens, with rotary
positions (pairs as neighbours) or none, and norms of rotated heads without gains. Queries that do not rotate are
multiplied by 1 + beta log(1 + floor((p + 1) / L)).

Growth copies whole heads with their pairs, norms and factors; chunks and rotations go where the layers go. All norms
share one eps, so the residual stream keeps its mean square, as in Qwen3. A head grows to whole multiples of its size:
every feature of a query has as many copies as the others, and those of keys are zero.

llama.cpp's llama4 loads no model without experts, so no GGUF file holds the family.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import CAUSAL
from megatron_ligo.arch.families.llama import (
    ATTENTION_BIAS,
    ATTENTION_BIASES,
    LLAMA,
    OUTPUT_FOLLOWS,
    PLAIN_FIELDS,
    params_with,
)
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import FormatLocation, ParamSpec, Role

EXPERTS = "only layers with experts read it, of which there are none"


def _params() -> Iterator[ParamSpec]:
    for param in params_with(*ATTENTION_BIASES):
        name = param.locations["hf"].name.replace(".mlp.", ".feed_forward.")
        hf = FormatLocation(name, interleaved=param.role in (Role.QUERY, Role.KEY))
        yield replace(param, locations={"hf": hf, "mcore": param.locations["mcore"]})


LLAMA4_TEXT = replace(
    LLAMA,
    name="llama4_text",
    model_types={"llama4_text": {"Llama4ForCausalLM": ()}},
    params=tuple(_params()),
    own_head_dim=True,
    scales_unrotated_queries=True,
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key not in ("intermediate_size", "sliding_window")}
    | ATTENTION_BIAS
    | {
        "intermediate_size_mlp": "ffn_size",
        "attention_chunk_size": "attention_chunk",
        "use_qk_norm": "l2_normalises_heads",
        "attn_scale": "query_scaling_beta",
        "floor_scale": "query_scaling_length",
    },
    coupled_fields={"llama4_text": OUTPUT_FOLLOWS},
    gguf_fields={},
    gguf_network=GgufNetwork(),
    required_hf_values={"hidden_act": "silu", "attn_temperature_tuning": True},
    hf_older_forms=(({"attn_temperature_tuning": False}, {"attn_temperature_tuning": True, "attn_scale": 0.0}),),
    foreign_hf_keys={},
    hf_pattern_keys={
        "llama4_text": (
            "layer_types", "no_rope_layers", "no_rope_layer_interval", "moe_layers", "interleave_moe_layer_step",
        )
    },
    implied_sizes={},
    expert_types={},
    hf_fixed=CAUSAL | {"sliding_window": (None,), "mlp_bias": (False, None), "use_bias": ()},
    hf_harmless=LLAMA.hf_harmless
    | dict.fromkeys(
        (
            "intermediate_size", "num_local_experts", "num_experts_per_tok", "output_router_logits",
            "router_aux_loss_coef", "router_jitter_noise",
        ),
        EXPERTS,
    ),
)  # fmt: skip
