"""Cohere (Command R, Aya): attention and feed-forward read one LayerNorm without a bias, and logits take a factor.

Growth is lossless at whole multiples of hidden_size: only they keep a LayerNorm's mean and variance. The factor of the
logits depends on no size. Hugging Face's and llama.cpp's files hold rotary pairs as neighbours.
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
from megatron_ligo.arch.spec import ParamSpec, Role

ROTATED = (Role.QUERY, Role.KEY)
DROPPED = ("rms_norm_eps", "sliding_window")


def _params() -> Iterator[ParamSpec]:
    for param in params_with(*ATTENTION_BIASES):
        hf = replace(param.locations["hf"], interleaved=param.role in ROTATED)
        if param.role is not Role.FFN_NORM:
            yield replace(
                param, locations={"hf": hf, "mcore": param.locations["mcore"], "gguf": param.locations["gguf"]}
            )


COHERE = replace(
    LLAMA,
    name="cohere",
    norm="layer",
    model_types={"cohere": {"CohereForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key not in DROPPED}
    | ATTENTION_BIAS
    | {"layer_norm_eps": "norm_eps", "logit_scale": "logits_multiplier"},
    coupled_fields={"cohere": OUTPUT_FOLLOWS},
    gguf_fields={key: name for key, name in LLAMA.gguf_fields.items() if name not in ("head_dim", "norm_eps")}
    | {"attention.layer_norm_epsilon": "norm_eps", "logit_scale": "logits_multiplier"},
    gguf_network=GgufNetwork(names={"command-r": "cohere"}),
    required_hf_values={"hidden_act": "silu", "use_qk_norm": False},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={"cohere": {"parallel_residual": True}},
    expert_types={},
    hf_fixed=CAUSAL | {"sliding_window": (None,), "use_bias": ()},
    hf_harmless={**LLAMA.hf_harmless, "model_max_length": "the length that its makers recommend"},
)
