"""Granite 3: Llama with constant factors of the embeddings, the scores, the residual sums and the logits.

None of the four depends on a size, so the large model keeps them: h = m E e(t) is E times the small h, a block's output
is linear in them, and scores and logits are those of the small model at any ratio. (A head size that grows is paid by
the queries: the stated factor of the scores does not change with it.)
"""

from dataclasses import replace

from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import LLAMA, OUTPUT_FOLLOWS

MULTIPLIERS = {
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logits_divisor",
}
GGUF_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_scale",
    "logit_scale": "logits_divisor",
}
HF_FIELDS = {key: name for key, name in LLAMA.hf_fields.items() if key != "sliding_window"}

GRANITE = replace(
    LLAMA,
    name="granite",
    model_types={"granite": {"GraniteForCausalLM": ()}},
    params=tuple(without_format(LLAMA.params, "fairscale")),
    hf_fields=HF_FIELDS | MULTIPLIERS,
    gguf_fields=LLAMA.gguf_fields | GGUF_MULTIPLIERS,
    coupled_fields={"granite": OUTPUT_FOLLOWS},
    required_hf_values={"hidden_act": "silu"},
    foreign_hf_keys={},
    # transformers reads it without a declaration.
    hf_fixed=LLAMA.hf_fixed | {"sliding_window": (None,)},
    hf_pattern_keys={},
    implied_sizes={},
)
