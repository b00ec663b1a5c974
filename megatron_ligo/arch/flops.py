"""FLOPs of training a model, counted from its shapes. Multiplications and additions count separately: a product of
(m, k) and (k, n) takes 2 m n k."""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec, Role, Use

# The backward pass has two products for each forward one: the gradients of input and weight.
FORWARD_AND_BACKWARD = 3


def forward_flops(model_config: ModelConfig, tokens: int, seq_length: int) -> int:
    """Returns the FLOPs of a forward pass over `tokens` tokens in sequences of `seq_length`.

    Counts linears, the head and attention (all pairs, masked or not). Omits norms, activations and look-ups.
    """
    arch = architectures.get(model_config.arch)
    total = 0
    for param in arch.params:
        is_linear = len(param.axes) > 1 and any(axis.use is Use.INPUT for axis in param.axes)
        if is_linear and param.exists(model_config) and param.reaches_loss:
            num_layers = model_config.num_layers if param.in_layer else 1
            num_vectors = _count_vectors(arch, param, model_config, tokens, seq_length)
            total += 2 * prod(param.shape(model_config)) * num_layers * num_vectors
    attention = 2 * 2 * seq_length * model_config.num_heads * model_config.head_dim
    return total + tokens * model_config.num_layers * attention


def _count_vectors(
    arch: Architecture, param: ParamSpec, model_config: ModelConfig, tokens: int, seq_length: int
) -> int:
    """Counts the vectors that a weight multiplies.

    One per token, and per expert that it is routed to; per patch or image outside a classifier's layers.
    """
    if not arch.reads_images or param.in_layer:
        return tokens * model_config.top_k if param.in_expert else tokens
    images = tokens // seq_length
    if param.role in (Role.HEAD, Role.PATCH_HEAD):
        return images
    return images * model_config.patches_per_side**2


def train_flops(model_config: ModelConfig, tokens: int, seq_length: int) -> int:
    """Returns the FLOPs of a forward and a backward pass. Excludes recomputation."""
    return FORWARD_AND_BACKWARD * forward_flops(model_config, tokens, seq_length)
