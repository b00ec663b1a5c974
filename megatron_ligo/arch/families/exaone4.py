"""EXAONE 4: OLMo 2's norms after the blocks, Qwen3's norms of the heads, and rotary positions in layers with a window.

A model without a window has rotary positions in every layer. Growth copies whole heads with their norms, and norms
after a block grow as in OLMo 2. The residual stream keeps the eps that all norms share, as in Qwen3.
"""

from dataclasses import replace

from megatron_ligo.arch.families.llama import LLAMA, PLAIN_FIELDS
from megatron_ligo.arch.families.olmo2 import OLMO2
from megatron_ligo.arch.families.qwen3 import KEY_NORM, QUERY_NORM
from megatron_ligo.arch.spec import Role

OF_ALL_HEADS = (Role.QUERY_NORM, Role.KEY_NORM)

EXAONE4 = replace(
    OLMO2,
    name="exaone4",
    model_types={"exaone4": {"Exaone4ForCausalLM": ()}},
    params=(
        *(param for param in OLMO2.params if param.role not in OF_ALL_HEADS and not param.requires),
        QUERY_NORM,
        KEY_NORM,
    ),
    hf_fields=PLAIN_FIELDS,
    # llama.cpp knows its windows by the number of layers.
    gguf_fields={},
    required_hf_values={"hidden_act": "silu"},
    hf_fixed=LLAMA.hf_fixed,
    hf_pattern_keys={"exaone4": ("layer_types", "sliding_window_pattern")},
    rotates_in_windows_only=True,
)
