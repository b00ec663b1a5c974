"""StableLM: Llama with LayerNorms and rotary positions on a part of each head, and biases on q, k and v if it says so.

Growth is lossless at whole multiples of hidden_size: only they keep a LayerNorm's mean and variance. Heads, KV groups
and neurons may grow at any ratio.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import CAUSAL, locations, norm_params
from megatron_ligo.arch.families.llama import LLAMA, PLAIN_FIELDS, params_with
from megatron_ligo.arch.spec import ParamSpec, Role

NORMS = {
    Role.ATTENTION_NORM: ("model.layers.{}.input_layernorm", "decoder.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    Role.FFN_NORM: (
        "model.layers.{}.post_attention_layernorm",
        "decoder.layers.{}.pre_mlp_layernorm",
        "blk.{}.ffn_norm",
    ),
    Role.FINAL_NORM: ("model.norm", "decoder.final_layernorm", "output_norm"),
}
RENAMED = {"layer_norm_eps": "norm_eps", "use_qkv_bias": "qkv_bias", "partial_rotary_factor": "rotary_fraction"}
DROPPED = ("head_dim", "rms_norm_eps", "sliding_window")


def _params() -> Iterator[ParamSpec]:
    for param in params_with("qkv_bias"):
        if param.role in NORMS:
            yield from norm_params(param.key, param.role, locations(*NORMS[param.role]), feeds_head=param.feeds_head)
        else:
            yield replace(param, locations={name: param.locations[name] for name in ("hf", "mcore", "gguf")})


STABLELM = replace(
    LLAMA,
    name="stablelm",
    norm="layer",
    model_types={"stablelm": {"StableLmForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key not in DROPPED} | RENAMED,
    gguf_fields={key: name for key, name in LLAMA.gguf_fields.items() if name not in ("head_dim", "norm_eps")}
    | {"attention.layer_norm_epsilon": "norm_eps"},
    required_hf_values={"hidden_act": "silu", "use_parallel_residual": False, "qk_layernorm": False},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    hf_fixed=CAUSAL | {"sliding_window": (None,), "use_bias": ()},
    hf_harmless={**LLAMA.hf_harmless, "hidden_dropout": "dropout acts in training only"},
)
