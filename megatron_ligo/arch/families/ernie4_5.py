"""ERNIE 4.5 (dense): Llama whose files hold the rotary pairs of q and k as neighbours.

Growth copies whole heads with their pairs, so a layer grows like Llama's, at any ratio.
"""

from dataclasses import replace

from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import ATTENTION_BIASES, LLAMA, PLAIN_FIELDS
from megatron_ligo.arch.spec import ParamSpec, Role


def _with_neighbours(param: ParamSpec) -> ParamSpec:
    location = replace(param.locations["hf"], interleaved=param.role in (Role.QUERY, Role.KEY))
    return replace(param, locations={**param.locations, "hf": location})


ERNIE4_5 = replace(
    LLAMA,
    name="ernie4_5",
    model_types={"ernie4_5": {"Ernie4_5ForCausalLM": ()}},
    own_head_dim=True,
    params=tuple(_with_neighbours(param) for param in without_format(LLAMA.params, "fairscale")),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key != "sliding_window"} | {"use_bias": "mlp_bias"},
    coupled_fields={"ernie4_5": dict.fromkeys(ATTENTION_BIASES, "mlp_bias")},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    expert_types={},
    hf_fixed={key: values for key, values in LLAMA.hf_fixed.items() if key != "use_bias"} | {"sliding_window": (None,)},
)
