"""OLMoE: experts in every layer, behind norms of the blocks' inputs, and norms over all queries and over all keys.

The weights of the chosen experts are a softmax over all experts, of which copies have equal shares: mixtures grow
without loss. No dense family has these norms, so that none grows into it.
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import ALL_KEYS_GAIN, ALL_QUERIES_GAIN
from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.families.olmo2 import KEY_NORM, QUERY_NORM
from megatron_ligo.arch.families.qwen3_moe import QWEN3_MOE
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import ParamSpec, Role

OLMOE = replace(
    QWEN3_MOE,
    name="olmoe",
    model_types={"olmoe": {"OlmoeForCausalLM": ()}},
    params=(
        *(param for param in QWEN3_MOE.params if param.role not in (Role.QUERY_NORM, Role.KEY_NORM)),
        *without_format(
            (
                ParamSpec("layers.{}.q_norm", Role.QUERY_NORM, (ALL_QUERIES_GAIN,), 0, QUERY_NORM),
                ParamSpec("layers.{}.k_norm", Role.KEY_NORM, (ALL_KEYS_GAIN,), 0, KEY_NORM),
            ),
            "gguf",
        ),
    ),
    hf_fields={
        **{key: name for key, name in QWEN3_MOE.hf_fields.items() if key not in ("moe_intermediate_size", "head_dim")},
        "intermediate_size": "ffn_size",
    },
    gguf_fields={},
    gguf_network=GgufNetwork(),
    coupled_fields={"olmoe": OUTPUT_FOLLOWS},
    required_hf_values={"hidden_act": "silu"},
    implied_sizes={},
    hf_fixed={
        key: values
        for key, values in QWEN3_MOE.hf_fixed.items()
        if key not in ("decoder_sparse_step", "mlp_only_layers")
    }
    # transformers reads a window and a head size without a declaration.
    | {"clip_qkv": (None,), "sliding_window": (None,), "head_dim": (None,)},
    hf_harmless={
        key: reason
        for key, reason in QWEN3_MOE.hf_harmless.items()
        if key not in ("intermediate_size", "sliding_window")
    },
)
