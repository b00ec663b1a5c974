"""Cohere 2 (Command R7B, Command A): Cohere whose layers have a window and rotary positions, or neither.

Growth is Cohere's; windows and rotary positions go where the layers go (growth/layer_kinds.py).
"""

from dataclasses import replace

from megatron_ligo.arch.families.cohere import COHERE
from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.gguf_network import GgufNetwork

COHERE2 = replace(
    COHERE,
    name="cohere2",
    model_types={"cohere2": {"Cohere2ForCausalLM": ()}},
    hf_fields={key: name for key, name in COHERE.hf_fields.items() if name != "head_dim"}
    | {"sliding_window": "sliding_window"},
    coupled_fields={"cohere2": OUTPUT_FOLLOWS},
    gguf_fields=COHERE.gguf_fields | {"attention.sliding_window": "sliding_window"},
    gguf_network=GgufNetwork(required=("attention.sliding_window",), window_period=4),
    required_hf_values={"hidden_act": "silu"},
    hf_pattern_keys={"cohere2": ("layer_types", "sliding_window_pattern")},
    rotates_in_windows_only=True,
    needs_window=True,
    implied_sizes={"cohere2": {"parallel_residual": True}},
    hf_fixed={key: values for key, values in COHERE.hf_fixed.items() if key != "sliding_window"}
    | {
        "use_qk_norm": (False, None),
        # Of the released configs, with the values that transformers assumes without reading them.
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
    },
    hf_harmless=COHERE.hf_harmless
    | dict.fromkeys(
        ("layer_switch", "use_embedding_sharing", "use_parallel_embedding"),
        "a key of the released configs that transformers does not read",
    ),
)
