"""Nemotron: StarCoder2's network with norms that multiply by 1 + w, a squared ReLU and rotary positions on a part of
each head. Its config states the head size, and biases of attention and of the feed-forward block apart.

Growth is lossless at whole multiples of hidden_size, as for GPT-2: only they keep a LayerNorm's mean and variance.
Gains grow as 1 + w. Heads, KV groups and neurons may grow at any ratio.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import DROPOUT
from megatron_ligo.arch.families.llama import ATTENTION_BIAS, MLP_BIAS, OUTPUT_FOLLOWS
from megatron_ligo.arch.families.starcoder2 import STARCODER2
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import ParamSpec, Role

LINEARS = {Role.FFN_UP: ("c_fc", "up_proj"), Role.FFN_DOWN: ("c_proj", "down_proj")}
DROPPED = ("norm_epsilon", "sliding_window", "use_bias")


def _params() -> Iterator[ParamSpec]:
    for param in STARCODER2.params:
        hf = param.locations["hf"]
        hf = replace(hf, name=hf.name.replace(*LINEARS.get(param.role, ("", ""))))
        yield replace(param, locations=param.locations | {"hf": hf})


NEMOTRON = replace(
    STARCODER2,
    name="nemotron",
    gain_offset=1.0,
    model_types={"nemotron": {"NemotronForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in STARCODER2.hf_fields.items() if key not in DROPPED}
    | ATTENTION_BIAS
    | MLP_BIAS
    | {"norm_eps": "norm_eps", "head_dim": "head_dim", "partial_rotary_factor": "rotary_fraction"},
    gguf_fields=STARCODER2.gguf_fields | {"attention.key_length": "head_dim"},
    gguf_network=GgufNetwork(constants={"activation": "relu2"}),
    coupled_fields={"nemotron": OUTPUT_FOLLOWS},
    hf_fixed=STARCODER2.hf_fixed | {"sliding_window": (None,), "use_bias": ()},
    hf_harmless=STARCODER2.hf_harmless
    | {
        "hidden_dropout": DROPOUT,
        **dict.fromkeys(
            ("kv_channels", "layer_norm_eps", "pretraining_tp"),
            "a key of the released configs that transformers does not read",
        ),
    },
)
