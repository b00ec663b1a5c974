"""Layer scale (DINOv2): a learned number for each feature of what a block returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x (s, b, hidden) -> x times a learned number for each feature. Constructed like mcore's norms."""

    def __init__(self, config, hidden_size: int, **_):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
