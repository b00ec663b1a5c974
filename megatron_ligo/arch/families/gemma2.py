"""Gemma 2: norms before and after each block, which multiply by 1 + w, GeGLU, bounded scores and logits, windows in
every other layer, and embeddings multiplied by the square root of the width.

The embedding's factor changes with the width, so its rows are divided by sqrt(D2 / D1); a tied head reads them, and the
last gain takes that factor back: h and logits are E times the small h, and the small logits. Gains grow as 1 + w. A
block's norm takes f = sqrt(D1 / D2), as in OLMo 2; scores have a stated head size, so they keep their factor.
"""

from dataclasses import replace

from megatron_ligo.arch.common_axes import RESIDUAL_GAIN
from megatron_ligo.arch.common_params import ACTIVATIONS, weight_of, without_format
from megatron_ligo.arch.families.llama import (
    ATTENTION_BIAS,
    ATTENTION_BIASES,
    FFN_NORM,
    LLAMA,
    OUTPUT_FOLLOWS,
    PLAIN_FIELDS,
    params_with,
)
from megatron_ligo.arch.families.olmo2 import ATTENTION_OUTPUT_NORM, BLOCK_OUTPUTS, FFN_OUTPUT_NORM
from megatron_ligo.arch.gguf_network import GgufNetwork
from megatron_ligo.arch.spec import FormatLocation, ParamSpec, Role

FFN_INPUT_NORM = weight_of(FFN_NORM | {"hf": FormatLocation("model.layers.{}.pre_feedforward_layernorm")})
OWN_FIELDS = {
    "hidden_activation": "activation",
    "query_pre_attn_scalar": "attention_scale_dim",
    "final_logit_softcapping": "logits_softcap",
    "attn_logit_softcapping": "attention_softcap",
}

GGUF_FIELDS = LLAMA.gguf_fields | {"attention.sliding_window": "sliding_window"}
# llama.cpp computes GELU by tanh.
GGUF_ACTIVATION = {"activation": "gelu_pytorch_tanh"}

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    gain_offset=1.0,
    scales_embedding=True,
    own_head_dim=True,
    model_types={"gemma2": {"Gemma2ForCausalLM": ()}},
    params=(
        *(
            replace(param, feeds_output_norm=param.role in BLOCK_OUTPUTS)
            for param in without_format(params_with(*ATTENTION_BIASES), "fairscale")
            if param.role is not Role.FFN_NORM
        ),
        ParamSpec("layers.{}.norm1_out", Role.ATTENTION_OUTPUT_NORM, (RESIDUAL_GAIN,), None, ATTENTION_OUTPUT_NORM),
        ParamSpec("layers.{}.norm2", Role.FFN_NORM, (RESIDUAL_GAIN,), None, FFN_INPUT_NORM),
        ParamSpec("layers.{}.norm2_out", Role.FFN_OUTPUT_NORM, (RESIDUAL_GAIN,), None, FFN_OUTPUT_NORM),
    ),
    hf_fields=PLAIN_FIELDS | ATTENTION_BIAS | OWN_FIELDS,
    coupled_fields={"gemma2": OUTPUT_FOLLOWS},
    gguf_fields=GGUF_FIELDS
    | {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logits_softcap"},
    gguf_network=GgufNetwork(
        constants=GGUF_ACTIVATION,
        required=("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
        window_period=2,
        wide_scale_layers=46,
    ),
    required_hf_values={},
    foreign_hf_keys={},
    hf_pattern_keys={"gemma2": ("layer_types",)},
    implied_sizes={},
    choices={"activation": ACTIVATIONS},
    hf_fixed=LLAMA.hf_fixed | {"use_bidirectional_attention": (None, False)},
    hf_harmless=LLAMA.hf_harmless
    | {
        "hidden_act": "transformers reads hidden_activation",
        "sliding_window_size": "a key of the released configs: transformers reads sliding_window",
    },
)
