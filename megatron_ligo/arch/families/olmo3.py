"""OLMo 3: OLMo 2 with windows in most layers, whose rotary positions keep their scale where the others' are scaled.

A layer grows like OLMo 2's: a whole head is copied, with its rotation. Its window, and with it the positions that it
has, goes where the layer goes (growth/layer_kinds.py).
"""

from dataclasses import replace

from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.families.olmo2 import OLMO2
from megatron_ligo.arch.gguf_network import GgufNetwork

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    model_types={"olmo3": {"Olmo3ForCausalLM": ()}},
    coupled_fields={"olmo3": OUTPUT_FOLLOWS},
    hf_fields=OLMO2.hf_fields | {"sliding_window": "sliding_window"},
    gguf_fields=OLMO2.gguf_fields | {"attention.sliding_window": "sliding_window"},
    # A file of OLMo 2 that states a window.
    gguf_network=GgufNetwork(names={"olmo2": "olmo3"}, required=("attention.sliding_window",), window_period=4),
    hf_fixed={key: values for key, values in OLMO2.hf_fixed.items() if key != "sliding_window"},
    hf_pattern_keys={"olmo3": ("layer_types",)},
    hf_rope_by_layer_type=True,
)
