"""SmolLM3: Llama with layers whose queries and keys do not rotate, by default every fourth one.

Growth copies whole heads, which rotate or do not as one, so a layer grows like Llama's. Its flag must go where the
layer goes: growth/layer_kinds.py moves it with the depth map, and a new layer, which writes nothing, takes its
source's.
"""

from dataclasses import replace

from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import LLAMA, OUTPUT_FOLLOWS
from megatron_ligo.arch.gguf_network import GgufNetwork

SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    model_types={"smollm3": {"SmolLM3ForCausalLM": ()}},
    params=tuple(without_format(LLAMA.params, "fairscale")),
    gguf_network=GgufNetwork(rope_period=4),
    coupled_fields={"smollm3": OUTPUT_FOLLOWS},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    hf_pattern_keys={"smollm3": ("layer_types", "no_rope_layers", "no_rope_layer_interval", "use_sliding_window")},
    implied_sizes={},
)
