"""Ministral 3: Llama whose queries are multiplied by a factor of their position, 1 + beta log(1 + floor(p / L)).

L is the original length of the rotary positions' scaling. Growth copies whole heads and keeps the length, so a copy has
the factor of its small head.
"""

from dataclasses import replace

from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import LLAMA, PLAIN_FIELDS, params_with
from megatron_ligo.arch.gguf_network import GgufNetwork

MINISTRAL3 = replace(
    LLAMA,
    name="ministral3",
    model_types={"ministral3": {"Ministral3ForCausalLM": ()}},
    own_head_dim=True,
    scales_queries=True,
    params=tuple(without_format(without_format(params_with(), "fairscale"), "torchtitan")),
    gguf_fields=LLAMA.gguf_fields | {"attention.temperature_scale": "query_scaling_beta"},
    gguf_network=GgufNetwork(names={"mistral3": "ministral3"}, has_yarn_scale=True),
    hf_fields=PLAIN_FIELDS,
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={},
    expert_types={},
)
