"""The biases of a layer's linears. Megatron-core's config adds them to all linears, or to q, k and v alone."""

from __future__ import annotations

from functools import cache

from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import nn

from megatron_ligo.arch.mcore_biases import LINEAR_ROLES, linear_biases
from megatron_ligo.arch.model_config import ModelConfig


def set_linear_biases(submodules: TransformerLayerSubmodules, mlp: object, model_config: ModelConfig) -> None:
    """Replaces a layer's linears by such as have the model's biases. mlp: the submodules of its MLP."""
    biases = linear_biases(model_config)
    for owner in (submodules.self_attention.submodules, mlp):
        for name in LINEAR_ROLES.keys() & vars(owner).keys():
            setattr(owner, name, _with_bias(getattr(owner, name), biases[name]))


@cache
def _with_bias(linear: type[nn.Module], has_bias: bool) -> type[nn.Module]:
    """Returns a class of linears that has a bias, or none, whatever its caller asks for."""

    def build(self: nn.Module, *sizes: int, **options: object) -> None:
        linear.__init__(self, *sizes, **{**options, "bias": has_bias})

    return type(linear.__name__, (linear,), {"__init__": build})
