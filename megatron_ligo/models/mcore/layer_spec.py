"""Megatron-core's config and layer spec of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.mcore_layer_patterns import to_layer_patterns
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.distributed import device
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.norm import Norm
from megatron_ligo.models.mcore.parallel_residual_layer import ParallelResidualLayer
from megatron_ligo.models.mcore.post_norm_layer import PostNormLayer
from megatron_ligo.models.mcore.rotary import set_attention_factor


@dataclass(frozen=True)
class BuildOptions:
    """Build options of layers. dtype: that of weights and activations."""

    dtype: torch.dtype = torch.float32
    tp: int = 1
    sequence_parallel: bool = False


def is_supported(arch: Architecture) -> bool:
    """True for post-norm masked-LM models and pre-norm models of all other tasks, without experts."""
    return arch.pre_norm is not arch.is_masked_lm and not arch.has_experts


def check_supported(model_config: ModelConfig) -> None:
    """Raises ConfigError for a model that cannot be built."""
    arch = architectures.get(model_config.arch)
    if not is_supported(arch):
        known = architectures.architectures().values()
        built = ", ".join(sorted(other.name for other in known if is_supported(other)))
        hint = "It can be converted and grown."
        raise ConfigError(Problem("fit and pretraining", f"one of {built}", model_config.arch, hint))
    if not model_config.has_head:
        hint = "With tied embeddings it is enough to name a class that has a head in its config's architectures."
        if not arch.is_causal:
            hint = "Pretrain it with fresh_head = true, which adds a head and trains the head alone."
        raise ConfigError(
            Problem("fit and pretraining", "a model with an output head", arch.hf_class(model_config), hint)
        )


def gelu_tanh(x: Tensor) -> Tensor:
    """GPT-2's approximation of GELU, on x of any shape."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


def get_ffn_activation(model_config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Returns the function between the MLP's linears: (..., ffn) -> (..., ffn), or if gated (..., 2 ffn), gate and up,
    -> (..., ffn)."""
    function = ACTIVATIONS[model_config.activation]
    if not architectures.get(model_config.arch).is_gated:
        return function

    def gate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up

    return gate


def get_normalization(model_config: ModelConfig) -> str:
    """Returns mcore's name for the model's kind of norm."""
    return {"rms": "RMSNorm", "layer": "LayerNorm"}[architectures.get(model_config.arch).norm]


def build_transformer_config(model_config: ModelConfig, build: BuildOptions) -> TransformerConfig:
    """Builds mcore's config. Its pipeline size stays 1: DeepSpeed partitions the stages, and mcore would offset the
    layer numbers."""
    arch = architectures.get(model_config.arch)
    config = TransformerConfig(
        num_layers=model_config.num_layers,
        hidden_size=model_config.hidden_size,
        ffn_hidden_size=model_config.ffn_size,
        num_attention_heads=model_config.num_heads,
        num_query_groups=model_config.num_kv_heads,
        kv_channels=model_config.head_dim,
        normalization=get_normalization(model_config),
        layernorm_epsilon=model_config.norm_eps,
        gated_linear_unit=arch.is_gated,
        activation_func=ACTIVATIONS[model_config.activation],
        add_bias_linear=arch.has_linear_biases,
        add_qkv_bias=model_config.qkv_bias,
        **to_layer_patterns(model_config),
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        apply_query_key_layer_scaling=False,
        rotary_interleaved=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=device.is_cpu(),
        params_dtype=build.dtype,
        pipeline_dtype=build.dtype,
        bf16=build.dtype is torch.bfloat16,
        tensor_model_parallel_size=build.tp,
        sequence_parallel=build.sequence_parallel,
    )
    set_attention_factor(config, model_config)
    return config


def get_layer_class(model_config: ModelConfig) -> type[TransformerLayer]:
    if model_config.parallel_residual:
        return ParallelResidualLayer
    return TransformerLayer if architectures.get(model_config.arch).pre_norm else PostNormLayer


def build_layer_spec(model_config: ModelConfig, dtype: torch.dtype) -> ModuleSpec:
    """Builds Transformer Engine's layer spec if it is installed, otherwise mcore's local spec with `FusedAttention` and
    `Norm`.

    Post-norm layers always use the local spec: Transformer Engine fuses the norms of pre-norm layers into its linears.
    Its attention serves 16 bits: in fp32 it keeps all attention weights in memory.
    """
    arch = architectures.get(model_config.arch)
    is_local = not (device.has_transformer_engine() and arch.pre_norm)
    if is_local:
        spec = copy.deepcopy(get_gpt_layer_local_spec(normalization=get_normalization(model_config)))
        spec.submodules.input_layernorm = Norm
        spec.submodules.pre_mlp_layernorm = Norm
    else:
        spec = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec())
    if is_local or dtype is torch.float32:
        spec.submodules.self_attention.submodules.core_attention = FusedAttention
    spec.module = get_layer_class(model_config)
    if not arch.is_causal:
        spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    return spec


def get_mlp_submodules(spec: ModuleSpec) -> MLPSubmodules:
    """Returns the MLP's submodules, which Megatron-core 0.16 stores in a spec and 0.19 in a partial."""
    mlp = spec.submodules.mlp
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def get_final_norm_class() -> type:
    """Returns the class of the norm after the last layer."""
    if device.has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return Norm
