"""The settings of a tiny Llama as a GPTModel, and the ones that megatron_perturbation.py changes."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ligo.models.mcore.layer_spec import UNFUSED

CONFIG = {
    "num_layers": 3,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-5,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
    **UNFUSED,
    "transformer_impl": "local",
    "use_cpu_initialization": True,
    "params_dtype": torch.float32,
}
MODEL = {
    "vocab_size": 64,
    "max_sequence_length": 64,
    "parallel_output": False,
    "share_embeddings_and_output_weights": False,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_base": 10_000,
    "rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "seq_len_interpolation_factor": None,
    "fp16_lm_cross_entropy": False,
    "scatter_embedding_sequence_parallel": True,
}
# Settings that round the weights.
PRECISION = ("params_dtype",)
# Values that show an effect which those of the field's type might not.
MORE_VALUES: dict[str, tuple[object, ...]] = {
    "activation_func": (F.gelu, F.relu, F.silu),
    "activation_func_clamp_value": (0.3, 7.0),
    "no_rope_freq": (3, [0, 1, 0], [1, 1, 1], [0, 0, 0]),
    "window_size": ((3, 0), (0, 0), (-1, -1), (-1, 0), (3, 3), (100, 0)),
    "position_embedding_type": ("learned_absolute", "none", "yarn"),
    "rotary_base": (500, 1_000_000),
    "rotary_percent": (0.5,),
    "seq_len_interpolation_factor": (2.0, 4, 1.0),
    "rope_scaling_factor": (32.0,),
    "softmax_scale": (0.5, 8**-0.5),
    "kv_channels": (16,),
    "num_query_groups": (4, 1),
    "layernorm_epsilon": (1e-2, 1e-6),
    "max_sequence_length": (32,),
}
# YaRN's settings act only together. GPTModel reads them from attributes of its config.
YARN: dict[str, object] = {
    "position_embedding_type": "yarn",
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
YARN_VALUES: dict[str, tuple[object, ...]] = {
    "yarn_rotary_scaling_factor": (2.0, 1.0, 0.5),
    "yarn_original_max_position_embeddings": (8, 64, 4096),
    "yarn_beta_fast": (4.0, 1.5),
    "yarn_beta_slow": (0.25, 2.0),
    "yarn_mscale": (0.5, 0.0, 2.0),
    "yarn_mscale_all_dim": (1.0, 0.5),
    "yarn_correction_range_round_to_int": (False,),
    "rotary_base": (500,),
    "rotary_percent": (0.5,),
    "seq_len_interpolation_factor": (2.0,),
    "rope_scaling": (True,),
    "window_size": ((3, 0),),
}
# Settings that only act together with another one.
PAIRS: tuple[dict[str, object], ...] = (
    YARN,
    *({**YARN, name: value} for name, values in YARN_VALUES.items() for value in values),
    {"window_size": (3, 0), "no_rope_freq": 3},
    {"window_size": (3, 0), "qk_layernorm": True},
    {"window_size": (3, 0), "seq_len_interpolation_factor": 2.0},
    {"window_size": (3, 0), "rope_scaling": True},
    {"window_size": (3, 0), "rotary_base": 500},
    {"window_size": (3, 0), "share_embeddings_and_output_weights": True},
    {"window_size": (3, 0), "max_sequence_length": 32},
    {"window_size": (3, 0), "num_query_groups": 4},
    {"window_size": (3, 0), "window_attn_skip_freq": 1},
    {"window_size": (3, 0), "window_attn_skip_freq": [0, 0, 0]},
    {"window_size": (-1, -1), "window_attn_skip_freq": 2},
    {"window_size": None, "window_attn_skip_freq": 2},
    {"window_size": (3, 0), "window_attn_skip_freq": 2},
    {"window_size": (3, 0), "window_attn_skip_freq": [1, 0, 1]},
    {"window_size": (3, 0), "window_attn_skip_freq": [1, 1, 1]},
    {"window_size": (3, 0), "add_qkv_bias": True},
    {"window_size": (3, 0), "softmax_type": "off-by-one"},
    {"rope_scaling": True, "rope_scaling_factor": 32.0},
    {"rope_scaling": True, "rotary_base": 500_000},
    {"rope_scaling": True, "seq_len_interpolation_factor": 2.0},
    {"glu_linear_offset": 1.0, "activation_func_clamp_value": 0.5},
    {"gated_linear_unit": False, "activation_func": F.gelu},
    {"gated_linear_unit": False, "activation_func": F.gelu, "normalization": "LayerNorm"},
    {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    {"position_embedding_type": "none", "no_rope_freq": 3},
)


def iter_cases(names: list[str] | None) -> Iterator[dict[str, object]]:
    """Yields the settings that each case changes. names: of single settings; None: all that the classes have."""
    hints = typing.get_type_hints(TransformerConfig)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(TransformerConfig)}
    hints = {name: typing.get_type_hints(GPTModel.__init__).get(name) for name in MODEL}
    for name, hint in {**fields, **hints}.items():
        if names is None or name in names:
            for value in (*MORE_VALUES.get(name, ()), *_values_of(hint, {**CONFIG, **MODEL}.get(name))):
                yield {name: value}
    if names is None:
        yield from PAIRS


def _values_of(hint: object, base: object) -> Iterator[object]:
    """Yields values of a type other than the base's."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for argument in arguments:
            if argument is not type(None):
                yield from _values_of(argument, base)
    elif origin is typing.Literal:
        yield from (value for value in arguments if value != base)
    elif hint is bool:
        yield from (value for value in (True, False) if value is not base)
    elif hint is int:
        yield from (1, 2, (base or 0) + 2)
    elif hint is float:
        yield from (0.5, 2.0)
    elif hint is str:
        yield "other"
    elif hint is torch.dtype:
        yield torch.bfloat16
    elif origin in (list, tuple):
        yield [1, 0, 1]
