"""FLOPs of training a model, counted from its shapes: multiplications and additions apart, 2 m n k for a product."""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec, Role, Use

# The backward pass has two products for each of the forward pass's: one for the input, one for the weight.
FORWARD_AND_BACKWARD = 3


def forward_flops(model_config: ModelConfig, tokens: int, seq_length: int) -> int:
    """One forward pass over `tokens` tokens in sequences of `seq_length`: linears, attention (whole squares, as
    kernels without a mask do) and head; norms, activations and look-ups are left out."""
    arch = architectures.get(model_config.arch)
    total = 0
    for param in arch.params:
        read = len(param.axes) > 1 and any(axis.use is Use.INPUT for axis in param.axes)
        if read and param.exists(model_config) and param.reaches_loss:
            layers = model_config.num_layers if param.in_layer else 1
            total += (
                2 * prod(param.shape(model_config)) * layers * _vectors(arch, param, model_config, tokens, seq_length)
            )
    attention = 2 * 2 * seq_length * model_config.num_heads * model_config.head_dim
    return total + tokens * model_config.num_layers * attention


def _vectors(arch: Architecture, param: ParamSpec, model_config: ModelConfig, tokens: int, seq_length: int) -> int:
    """How many vectors a row multiplies: one a token; outside the layers of a classifier one a patch, or an image."""
    if not arch.reads_images or param.in_layer:
        return tokens
    images = tokens // seq_length
    return images if param.role is Role.HEAD else images * model_config.patches_a_side**2


def train_flops(model_config: ModelConfig, tokens: int, seq_length: int) -> int:
    """Forward and backward over `tokens` tokens; recomputation is a layout's cost and is not counted."""
    return FORWARD_AND_BACKWARD * forward_flops(model_config, tokens, seq_length)
