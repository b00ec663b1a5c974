"""The biases of a layer's linears. Megatron-core's config adds them to all linears, or to q, k and v alone."""

from __future__ import annotations

from functools import cache

from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role

# Whose bias each linear has, by Megatron-core's names.
ROLES = {
    "linear_qkv": Role.QUERY,
    "linear_proj": Role.ATTENTION_OUTPUT,
    "linear_fc1": Role.FFN_UP,
    "linear_fc2": Role.FFN_DOWN,
}


def linear_biases(model_config: ModelConfig) -> dict[str, bool]:
    """Returns which linears of a layer have a bias, by Megatron-core's names."""
    arch = architectures.get(model_config.arch)
    return {name: arch.has_bias(role, model_config) for name, role in ROLES.items()}


def has_common_biases(model_config: ModelConfig) -> bool:
    """True if Megatron-core's config can state which linears have a bias."""
    biases = linear_biases(model_config)
    others = {biases[name] for name in ROLES if name != "linear_qkv"}
    return len(others) == 1 and biases["linear_qkv"] >= max(others)


def set_linear_biases(submodules: TransformerLayerSubmodules, mlp: object, model_config: ModelConfig) -> None:
    """Replaces a layer's linears by such as have the model's biases. mlp: the submodules of its MLP."""
    biases = linear_biases(model_config)
    for owner in (submodules.self_attention.submodules, mlp):
        for name in ROLES.keys() & vars(owner).keys():
            setattr(owner, name, _with_bias(getattr(owner, name), biases[name]))


@cache
def _with_bias(linear: type[nn.Module], has_bias: bool) -> type[nn.Module]:
    """Returns a class of linears that has a bias, or none, whatever its caller asks for."""

    def build(self: nn.Module, *sizes: int, **options: object) -> None:
        linear.__init__(self, *sizes, **{**options, "bias": has_bias})

    return type(linear.__name__, (linear,), {"__init__": build})
