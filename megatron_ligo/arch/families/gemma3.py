"""Gemma 3 (text): Gemma 2 with a norm of each query and key head, unbounded scores, and rotary positions of their own
in the layers with a window.

Growth is Gemma 2's, with whole heads copied and their norms with them, as in Qwen3, whose residual stream keeps the
eps that all norms share.
"""

from dataclasses import replace

from megatron_ligo.arch.families.gemma2 import GEMMA2, GGUF_ACTIVATION, GGUF_FIELDS
from megatron_ligo.arch.families.llama import OUTPUT_FOLLOWS
from megatron_ligo.arch.families.qwen3 import KEY_NORM, QUERY_NORM
from megatron_ligo.arch.gguf_network import GgufNetwork

GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    model_types={"gemma3_text": {"Gemma3ForCausalLM": ()}},
    coupled_fields={"gemma3_text": OUTPUT_FOLLOWS},
    params=(*GEMMA2.params, QUERY_NORM, KEY_NORM),
    hf_fields={
        **{key: name for key, name in GEMMA2.hf_fields.items() if name != "attention_softcap"},
        "rope_local_base_freq": "window_rope_base",
    },
    # Its versions bound the logits of some files only.
    gguf_fields=GGUF_FIELDS | {"rope.freq_base_swa": "window_rope_base"},
    gguf_network=GgufNetwork(
        names={"gemma3": "gemma3_text"},
        constants=GGUF_ACTIVATION,
        required=("attention.sliding_window",),
        window_period=6,
        window_rope_base=10000.0,
        wide_scale_layers=62,
    ),
    hf_pattern_keys={"gemma3_text": ("layer_types", "sliding_window_pattern")},
    hf_rope_by_layer_type=True,
    # transformers declares it and does not read it.
    hf_fixed=GEMMA2.hf_fixed | {"attn_logit_softcapping": (None,)},
    hf_harmless=GEMMA2.hf_harmless | {"_sliding_window_pattern": "a record of what layer_types was derived from"},
)
