"""Gemma: Llama with norms that multiply by 1 + w, GeGLU, and embeddings multiplied by the square root of the width.

Growth is Gemma 2's without the norms after the blocks: rows of the embedding are divided by sqrt(D2 / D1), a tied head
reads them, and the last gain takes that factor back. It is lossless at any ratio.
"""

from dataclasses import replace

from megatron_ligo.arch.common_params import without_format
from megatron_ligo.arch.families.llama import (
    ATTENTION_BIAS,
    ATTENTION_BIASES,
    LLAMA,
    OUTPUT_FOLLOWS,
    PLAIN_FIELDS,
    params_with,
)

TANH_GELU = "gelu_pytorch_tanh"

GEMMA = replace(
    LLAMA,
    name="gemma",
    gain_offset=1.0,
    scales_embedding=True,
    own_head_dim=True,
    model_types={"gemma": {"GemmaForCausalLM": ()}},
    params=tuple(without_format(params_with(*ATTENTION_BIASES), "fairscale")),
    hf_fields={key: name for key, name in PLAIN_FIELDS.items() if key != "sliding_window"} | ATTENTION_BIAS,
    coupled_fields={"gemma": OUTPUT_FOLLOWS},
    required_hf_values={},
    foreign_hf_keys={},
    hf_pattern_keys={},
    implied_sizes={"gemma": {"activation": TANH_GELU}},
    expert_types={},
    hf_fixed=LLAMA.hf_fixed
    | {
        # The first releases say gelu and mean this.
        "hidden_act": ("gelu", TANH_GELU),
        "hidden_activation": (None, TANH_GELU),
        "sliding_window": (None,),
        "use_bidirectional_attention": (None, False),
    },
)
