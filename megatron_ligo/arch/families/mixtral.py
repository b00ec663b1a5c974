"""Mixtral: Llama's network whose feed-forward blocks are experts, of which a router chooses `top_k` for each token.

The weights of the chosen experts are their softmax among each other, so copies of one expert compute what it computes.
"""

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.common_axes import EXPERT_OUTPUT, FFN_INPUT, FFN_OUTPUT, RESIDUAL_INPUT, RESIDUAL_OUTPUT
from megatron_ligo.arch.common_params import DROPOUT
from megatron_ligo.arch.families.llama import LLAMA, PLAIN_FIELDS
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec, Role

DENSE_BLOCK = (Role.FFN_GATE, Role.FFN_UP, Role.FFN_DOWN)
SHARED_PARAMS = tuple(param for param in LLAMA.params if param.role not in DENSE_BLOCK and not param.requires)


def expert_params(router: str, gate: str, up: str, down: str) -> tuple[ParamSpec, ...]:
    """Returns the router and the experts' matrices, from their names in a layer of Hugging Face's files."""

    def locations(name: str, mcore: str, gguf: str, **packing) -> dict[str, FormatLocation]:
        return {
            "hf": FormatLocation(f"model.layers.{{}}.{name}.weight"),
            "mcore": FormatLocation(f"decoder.layers.{{}}.mlp.{mcore}.weight", **packing),
            # Of the experts one by one: files hold them together (gguf/expert_blocks.py).
            "gguf": FormatLocation(f"blk.{{}}.{gguf}.weight"),
        }

    def fc1(name: str, part: int, gguf: str) -> dict[str, FormatLocation]:
        packing = {"pack": Pack.STACKED, "part": part, "num_parts": 2}
        return locations(name, "experts.local_experts.{}.linear_fc1", gguf, **packing)

    scores = locations(router, "router", "ffn_gate_inp")
    fc2 = locations(down, "experts.local_experts.{}.linear_fc2", "ffn_down_exps.{}")
    gates, ups = fc1(gate, 0, "ffn_gate_exps.{}"), fc1(up, 1, "ffn_up_exps.{}")
    return (
        ParamSpec("layers.{}.router", Role.ROUTER, (EXPERT_OUTPUT, RESIDUAL_INPUT), None, scores),
        ParamSpec("layers.{}.experts.{}.gate", Role.EXPERT_GATE, (FFN_OUTPUT, RESIDUAL_INPUT), 0, gates),
        ParamSpec("layers.{}.experts.{}.up", Role.EXPERT_UP, (FFN_OUTPUT, RESIDUAL_INPUT), 0, ups),
        ParamSpec("layers.{}.experts.{}.down", Role.EXPERT_DOWN, (RESIDUAL_OUTPUT, FFN_INPUT), 1, fc2),
    )


MIXTRAL = Architecture(
    name="mixtral",
    norm="rms",
    model_types={"mixtral": {"MixtralForCausalLM": ()}},
    params=(
        *SHARED_PARAMS,
        *expert_params(
            "block_sparse_moe.gate",
            "block_sparse_moe.experts.{}.w1",
            "block_sparse_moe.experts.{}.w3",
            "block_sparse_moe.experts.{}.w2",
        ),
    ),
    gguf_fields=LLAMA.gguf_fields | {"expert_count": "num_experts", "expert_used_count": "top_k"},
    gguf_network=GgufNetwork(names={"llama": "mixtral"}, required=("expert_count", "expert_used_count")),
    hf_fields=PLAIN_FIELDS | {"num_local_experts": "num_experts", "num_experts_per_tok": "top_k"},
    hf_aliases={"num_experts": "num_local_experts"},
    required_hf_values={"hidden_act": "silu"},
    implied_sizes={"mixtral": {"qkv_bias": False, "renormalises_routing": True}},
    fused_experts={
        "model.layers.{}.mlp.experts.gate_up_proj": (Role.EXPERT_GATE, Role.EXPERT_UP),
        "model.layers.{}.mlp.experts.down_proj": (Role.EXPERT_DOWN,),
    },
    renamed_suffixes={"hf": {"mlp.gate.weight": "block_sparse_moe.gate.weight"}},
    ignored_names=LLAMA.ignored_names,
    hf_fixed=LLAMA.hf_fixed,
    hf_harmless={
        **dict.fromkeys(("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"), DROPOUT),
        "output_router_logits": "what a call returns beside the logits",
        "router_aux_loss_coef": "a share of the training loss, which the logits do not show",
        "router_jitter_noise": "noise on the router's inputs in training only",
    },
)
