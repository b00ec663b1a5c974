"""Qwen2-MoE: Qwen2 whose feed-forward blocks are experts, in every layer, beside one that every token passes.

What the shared expert returns is multiplied by a sigmoid of the token. A dense model grows into it without loss as
copies of its block (with norm_topk_prob), or as the shared expert, under any router.
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import (
    RESIDUAL_INPUT,
    RESIDUAL_OUTPUT,
    SCORE_OUTPUT,
    SHARED_FFN_INPUT,
    SHARED_FFN_OUTPUT,
)
from megatron_ligo.arch.families.llama import params_with
from megatron_ligo.arch.families.mixtral import DENSE_BLOCK
from megatron_ligo.arch.families.qwen3_moe import GGUF_EXPERTS, QWEN3_MOE
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

EXPERTS = (Role.ROUTER, Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)


def _shared(hf: str, mcore: str, gguf: str, **packing) -> dict[str, FormatLocation]:
    return {
        "hf": FormatLocation(f"model.layers.{{}}.mlp.{hf}.weight"),
        "mcore": FormatLocation(f"decoder.layers.{{}}.mlp.shared_experts.{mcore}", **packing),
        "gguf": FormatLocation(f"blk.{{}}.{gguf}.weight"),
    }


def _shared_fc1(hf: str, part: int, gguf: str) -> dict[str, FormatLocation]:
    return _shared(hf, "linear_fc1.weight", gguf, pack=Pack.STACKED, part=part, num_parts=2)


SHARED_EXPERT = (
    ParamSpec(
        "layers.{}.shared_gate",
        Role.SHARED_EXPERT_GATE,
        (SHARED_FFN_OUTPUT, RESIDUAL_INPUT),
        0,
        _shared_fc1("shared_expert.gate_proj", 0, "ffn_gate_shexp"),
    ),
    ParamSpec(
        "layers.{}.shared_up",
        Role.SHARED_EXPERT_UP,
        (SHARED_FFN_OUTPUT, RESIDUAL_INPUT),
        0,
        _shared_fc1("shared_expert.up_proj", 1, "ffn_up_shexp"),
    ),
    ParamSpec(
        "layers.{}.shared_down",
        Role.SHARED_EXPERT_DOWN,
        (RESIDUAL_OUTPUT, SHARED_FFN_INPUT),
        1,
        _shared("shared_expert.down_proj", "linear_fc2.weight", "ffn_down_shexp"),
    ),
    ParamSpec(
        "layers.{}.shared_weight",
        Role.SHARED_EXPERT_WEIGHT,
        (SCORE_OUTPUT, RESIDUAL_INPUT),
        None,
        _shared("shared_expert_gate", "gate_weight", "ffn_gate_inp_shexp"),
    ),
)

QWEN2_MOE = replace(
    QWEN3_MOE,
    name="qwen2_moe",
    model_types={"qwen2_moe": {"Qwen2MoeForCausalLM": ()}},
    params=(
        *(param for param in params_with("qkv_bias") if param.role not in DENSE_BLOCK),
        *(param for param in QWEN3_MOE.params if param.role in EXPERTS),
        *SHARED_EXPERT,
    ),
    hf_fields={key: name for key, name in QWEN3_MOE.hf_fields.items() if name != "qkv_bias"}
    | {"shared_expert_intermediate_size": "shared_expert_ffn_size"},
    gguf_fields=QWEN3_MOE.gguf_fields | {"expert_shared_feed_forward_length": "shared_expert_ffn_size"},
    gguf_network=GgufNetwork(
        names={"qwen2moe": "qwen2_moe"},
        constants={"renormalises_routing": False},
        required=(*GGUF_EXPERTS, "expert_shared_feed_forward_length"),
    ),
    hf_aliases={},
    required_hf_values={"hidden_act": "silu", "use_sliding_window": False, "qkv_bias": True},
    implied_sizes={"qwen2_moe": {"sliding_window": None, "qkv_bias": True}},
    hf_harmless=QWEN3_MOE.hf_harmless | {"max_window_layers": "without use_sliding_window there is no window"},
)
