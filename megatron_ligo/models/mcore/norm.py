"""The norm of layers without Transformer Engine. Megatron-core's own norm does not support sequence parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """Applies RMSNorm or LayerNorm over the last dim of x (..., n), in x's dtype. weight, bias: (n,)."""
    size = (x.shape[-1],)
    if kind == "RMSNorm":
        return F.rms_norm(x, size, weight, eps)
    return F.layer_norm(x, size, weight, bias, eps)


class Norm(nn.Module):
    """Trainable RMSNorm or LayerNorm, (..., hidden) -> (..., hidden), constructed like mcore's norms."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.kind = config.normalization
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight, self.bias, self.eps, self.kind)
