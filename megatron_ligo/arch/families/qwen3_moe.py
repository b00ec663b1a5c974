"""Qwen3-MoE: Qwen3 whose feed-forward blocks are experts, in every layer.

The weights of the chosen experts add up to 1 only with norm_topk_prob: without it a dense model has no lossless form.
"""

from dataclasses import replace

from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.families.mixtral import DENSE_BLOCK, expert_params
from megatron_ligo.arch.families.qwen3 import QWEN3
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import Role

GGUF_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "top_k",
    "expert_feed_forward_length": "ffn_size",
}

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    model_types={"qwen3_moe": {"Qwen3MoeForCausalLM": ()}},
    params=(
        *(param for param in QWEN3.params if param.role not in DENSE_BLOCK),
        *expert_params("mlp.gate", "mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
    ),
    own_head_dim=False,
    coupled_fields={"qwen3_moe": OUTPUT_FOLLOWS},
    hf_fields={
        **{key: name for key, name in QWEN3.hf_fields.items() if name not in ("ffn_size", "sliding_window")},
        "moe_intermediate_size": "ffn_size",
        "num_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "norm_topk_prob": "renormalises_routing",
    },
    hf_aliases={"num_local_experts": "num_experts"},
    required_hf_values=QWEN3.required_hf_values | {"use_sliding_window": False},
    hf_pattern_keys={},
    gguf_fields={key: name for key, name in QWEN3.gguf_fields.items() if name != "ffn_size"} | GGUF_EXPERTS,
    # llama.cpp divides the weights of the chosen experts by their sum.
    gguf_network=GgufNetwork(
        names={"qwen3moe": "qwen3_moe"}, constants={"renormalises_routing": True}, required=tuple(GGUF_EXPERTS)
    ),
    expert_types={},
    implied_sizes={"qwen3_moe": {"sliding_window": None}},
    fused_experts={
        "model.layers.{}.mlp.experts.gate_up_proj": (Role.EXPERT_GATE, Role.EXPERT_UP),
        "model.layers.{}.mlp.experts.down_proj": (Role.EXPERT_DOWN,),
    },
    hf_fixed=QWEN3.hf_fixed | {"decoder_sparse_step": (1,), "mlp_only_layers": ([], None)},
    hf_harmless=QWEN3.hf_harmless
    | {
        "intermediate_size": "the width of dense blocks, of which there are none",
        "sliding_window": "without use_sliding_window there is no window",
        "output_router_logits": "what a call returns beside the logits",
        "router_aux_loss_coef": "a share of the training loss, which the logits do not show",
    },
)
