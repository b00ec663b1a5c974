"""The norm of layers without Transformer Engine. Megatron-core's own norm does not support sequence parallelism."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ligo.distributed.collectives import copy_to, reduce_from
from megatron_ligo.distributed.mesh import current_tp_group


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Applies RMSNorm or LayerNorm over the last dim of x (..., n), in x's dtype. weight, bias: (n,)."""
    size = (x.shape[-1],)
    if kind == "RMSNorm":
        return F.rms_norm(x, size, weight, eps)
    return F.layer_norm(x, size, weight, bias, eps)


def normalise_all_heads(x: Tensor, weight: Tensor, eps: float, num_heads: int, group: dist.ProcessGroup) -> Tensor:
    """Applies RMSNorm over the heads of all TP ranks together. x: (s, b, heads / tp, d), weight: (heads / tp x d,)."""
    squares = reduce_from(x.float().square().sum(dim=(-2, -1), keepdim=True), group)
    # Each rank divides its own heads by the root: a partial use.
    mean = copy_to(squares, group) / (num_heads * x.shape[-1])
    return x * torch.rsqrt(mean + eps).to(x.dtype) * weight.view(x.shape[-2:])


class Norm(nn.Module):
    """Trainable RMSNorm or LayerNorm, (..., hidden) -> (..., hidden), constructed like mcore's norms.

    A LayerNorm has a bias if the config's norm_bias, which layer_spec.py sets, says so. The gain is 1 + weight if its
    layernorm_zero_centered_gamma says so.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.kind = config.normalization
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = nn.Parameter(torch.full((hidden_size,), 1 - self.offset, dtype=config.params_dtype))
        self.bias = None
        if self.kind == "LayerNorm" and config.norm_bias:
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.offset if self.offset else self.weight
        return normalise(x, weight, self.bias, self.eps, self.kind)


class AllHeadsNorm(nn.Module):
    """Trainable RMSNorm over all heads, (s, b, heads / tp, d) -> the same shape. num_heads: of all ranks."""

    def __init__(self, config, hidden_size: int, num_heads: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps, self.num_heads = eps, num_heads
        local = num_heads // config.tensor_model_parallel_size * hidden_size
        self.weight = nn.Parameter(torch.ones(local, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return normalise_all_heads(x, self.weight, self.eps, self.num_heads, current_tp_group())
