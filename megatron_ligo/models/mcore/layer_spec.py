"""Megatron-core's config and layer spec of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.mcore_biases import has_common_biases
from megatron_ligo.arch.mcore_layer_patterns import to_layer_patterns
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.distributed import device
from megatron_ligo.distributed.mesh import context_place
from megatron_ligo.models.mcore.attention import FusedAttention, UlyssesAttention
from megatron_ligo.models.mcore.expert_routing import to_routing_settings
from megatron_ligo.models.mcore.layer_scale import LayerScale
from megatron_ligo.models.mcore.linear_biases import set_linear_biases
from megatron_ligo.models.mcore.norm import AllHeadsNorm, Norm
from megatron_ligo.models.mcore.parallel_residual_layer import ParallelResidualLayer, SharedNormLayer
from megatron_ligo.models.mcore.post_norm_layer import PostNormLayer
from megatron_ligo.models.mcore.residual_branch_layer import ResidualBranchLayer, ResidualBranchSubmodules
from megatron_ligo.models.mcore.rotary import get_query_scaling, set_attention_factor

# Fields of TransformerConfig under which every layer runs on every device, and draws no numbers.
UNFUSED = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


@dataclass(frozen=True)
class BuildOptions:
    """Build options of layers. dtype: that of weights and activations. router_aux_loss: the weight of the routers'
    load-balancing loss. ep: ranks that divide a layer's experts among them."""

    dtype: torch.dtype = torch.float32
    tp: int = 1
    sequence_parallel: bool = False
    router_aux_loss: float = 0.0
    ep: int = 1


def is_supported(arch: Architecture) -> bool:
    """True for pre-norm models, and post-norm ones that predict masked tokens."""
    return arch.pre_norm or arch.is_masked_lm


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
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
}


def get_ffn_activation(model_config: ModelConfig) -> Callable[[Tensor], Tensor]:
    """Returns the function between the MLP's linears: (..., ffn) -> (..., ffn), or if gated (..., 2 ffn), gate and up,
    -> (..., ffn)."""
    function = ACTIVATIONS[model_config.activation]
    if not architectures.get(model_config.arch).is_gated(model_config):
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
        layernorm_zero_centered_gamma=arch.gain_offset == 1,
        qk_layernorm=arch.has_head_norms,
        softmax_type="learnable" if arch.has_sinks else "vanilla",
        softmax_scale=None if has_default_scale(model_config) else model_config.score_scale,
        gated_linear_unit=arch.is_gated(model_config),
        activation_func=ACTIVATIONS[model_config.activation],
        # Where the linears differ, linear_biases.py replaces them. Megatron-core refuses the setting with experts.
        add_bias_linear=arch.has_bias(Role.FFN_DOWN, model_config),
        add_qkv_bias=arch.has_bias(Role.QUERY, model_config),
        **to_layer_patterns(model_config),
        **to_routing_settings(model_config, build.router_aux_loss),
        **UNFUSED,
        attention_softmax_in_fp32=True,
        apply_query_key_layer_scaling=False,
        rotary_interleaved=False,
        use_cpu_initialization=device.is_cpu(),
        params_dtype=build.dtype,
        pipeline_dtype=build.dtype,
        bf16=build.dtype is torch.bfloat16,
        tensor_model_parallel_size=build.tp,
        expert_model_parallel_size=build.ep,
        sequence_parallel=build.sequence_parallel,
    )
    set_attention_factor(config, model_config)
    # For this package's own modules: mcore's config has no fields for them.
    config.residual_multiplier = model_config.residual_multiplier
    config.norm_bias = arch.has_norm_biases(model_config)
    config.attention_softcap = model_config.attention_softcap
    config.query_scaling = get_query_scaling(model_config)
    config.attention_chunk, config.chunk_layers = model_config.attention_chunk, model_config.chunk_layers
    config.l2_normalises_heads = model_config.l2_normalises_heads
    return config


def has_default_scale(model_config: ModelConfig) -> bool:
    """True if attention scores are divided by the square root of the head size."""
    return model_config.attention_scale is None and model_config.attention_scale_dim is None


def get_layer_class(model_config: ModelConfig) -> type[TransformerLayer]:
    arch = architectures.get(model_config.arch)
    if model_config.parallel_residual:
        return SharedNormLayer if arch.shares_norm(model_config) else ParallelResidualLayer
    if not arch.pre_norm:
        return PostNormLayer
    has_own_branches = arch.has_output_norms or arch.has_output_scales or model_config.residual_multiplier != 1
    return ResidualBranchLayer if has_own_branches else TransformerLayer


def build_layer_spec(model_config: ModelConfig, dtype: torch.dtype, layer: int | None = None) -> ModuleSpec:
    """Builds Transformer Engine's layer spec if it is installed, otherwise mcore's local spec with `FusedAttention` and
    `Norm`.

    Layers of this package's own, normalised heads and experts always use the local spec: Transformer Engine fuses the
    norms of pre-norm layers into its linears. Its attention serves 16 bits: in fp32 it keeps all attention weights in
    memory. layer: its number, if layers differ in their modules.
    """
    arch = architectures.get(model_config.arch)
    layer_class = get_layer_class(model_config)
    is_plain = layer_class in (TransformerLayer, ParallelResidualLayer) and not arch.has_head_norms
    is_plain = is_plain and not arch.has_experts and has_common_biases(model_config)
    is_plain = is_plain and not model_config.query_scaling_beta and not arch.starts_unnormalised and not arch.has_sinks
    is_plain = is_plain and model_config.attention_chunk is None and not model_config.l2_normalises_heads
    is_plain = is_plain and (arch.uses_rms_norm or arch.has_norm_biases(model_config))
    is_local = not (device.has_transformer_engine() and is_plain and model_config.attention_softcap is None)
    if is_local:
        num_experts = model_config.num_experts or None
        spec = copy.deepcopy(
            get_gpt_layer_local_spec(num_experts=num_experts, normalization=get_normalization(model_config))
        )
        spec.submodules.input_layernorm = IdentityOp if layer == 0 and arch.starts_unnormalised else Norm
        spec.submodules.pre_mlp_layernorm = IdentityOp if layer_class is SharedNormLayer else Norm
    else:
        spec = copy.deepcopy(get_gpt_layer_with_transformer_engine_spec())
    _, cp = context_place()
    if is_local or dtype is torch.float32 or cp > 1:
        core_attention = UlyssesAttention if cp > 1 else FusedAttention
        spec.submodules.self_attention.submodules.core_attention = core_attention
    if arch.has_head_norms:
        _add_head_norms(spec, model_config, arch)
    if not has_common_biases(model_config):
        set_linear_biases(spec.submodules, get_mlp_submodules(spec), model_config)
    spec.module = layer_class
    if layer_class is ResidualBranchLayer:
        spec.submodules = _build_branch_submodules(spec.submodules, arch)
    if not arch.is_causal:
        spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    return spec


def _add_head_norms(spec: ModuleSpec, model_config: ModelConfig, arch: Architecture) -> None:
    """Adds norms of queries and keys, of each head or over all heads."""
    attention = spec.submodules.self_attention.submodules
    if not arch.normalises_all_heads:
        attention.q_layernorm = attention.k_layernorm = Norm
        return
    attention.q_layernorm = ModuleSpec(module=AllHeadsNorm, params={"num_heads": model_config.num_heads})
    attention.k_layernorm = ModuleSpec(module=AllHeadsNorm, params={"num_heads": model_config.num_kv_heads})


def _build_branch_submodules(submodules: TransformerLayerSubmodules, arch: Architecture) -> ResidualBranchSubmodules:
    """Returns a layer's modules with the norms and scales that the family has before and after its blocks."""
    norms = {
        "input_layernorm": Role.ATTENTION_NORM,
        "pre_mlp_layernorm": Role.FFN_NORM,
        "post_self_attn_layernorm": Role.ATTENTION_OUTPUT_NORM,
        "post_mlp_layernorm": Role.FFN_OUTPUT_NORM,
    }
    scales = {
        "post_self_attn_scale": Role.ATTENTION_OUTPUT_SCALE,
        "post_mlp_scale": Role.FFN_OUTPUT_SCALE,
    }
    own = {name: Norm if arch.has(role) else IdentityOp for name, role in norms.items()}
    own |= {name: LayerScale if arch.has(role) else IdentityOp for name, role in scales.items()}
    return ResidualBranchSubmodules(**{**vars(submodules), **own})


def get_mlp_submodules(spec: ModuleSpec) -> MLPSubmodules:
    """Returns the MLP's submodules, which Megatron-core 0.16 stores in a spec and 0.19 in a partial."""
    mlp = spec.submodules.mlp
    return mlp.submodules if isinstance(mlp, ModuleSpec) else mlp.keywords["submodules"]


def get_final_norm_class(model_config: ModelConfig) -> type:
    """Returns the class of the norm after the last layer."""
    arch = architectures.get(model_config.arch)
    if device.has_transformer_engine() and (arch.uses_rms_norm or arch.has_norm_biases(model_config)):
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return Norm
