"""Arcee (AFM): Llama without a gate, whose feed-forward block squares a ReLU.

Growth is Llama's, at any ratio: copies of a neuron compute the same, and the readers share them.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_ligo.arch.common_params import ACTIVATIONS, without_format
from megatron_ligo.arch.families.llama import LLAMA, OUTPUT_FOLLOWS
from megatron_ligo.arch.spec import Pack, ParamSpec, Role


def _params() -> Iterator[ParamSpec]:
    for param in without_format(without_format(LLAMA.params, "fairscale"), "torchtitan"):
        if param.role is Role.FFN_UP:
            whole = replace(param.locations["mcore"], pack=Pack.NONE, part=0, num_parts=1)
            yield replace(param, locations=param.locations | {"mcore": whole})
        elif param.role is not Role.FFN_GATE:
            yield param


ARCEE = replace(
    LLAMA,
    name="arcee",
    model_types={"arcee": {"ArceeForCausalLM": ()}},
    params=tuple(_params()),
    hf_fields={key: name for key, name in LLAMA.hf_fields.items() if key != "sliding_window"}
    | {"hidden_act": "activation"},
    coupled_fields={"arcee": OUTPUT_FOLLOWS},
    gguf_fields={},
    required_hf_values={},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    expert_types={},
    choices={"activation": ACTIVATIONS},
    hf_fixed=LLAMA.hf_fixed | {"sliding_window": (None,)},
)
