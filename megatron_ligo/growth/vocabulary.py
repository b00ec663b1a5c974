"""A larger vocabulary: the tokens that the small model has keep their rows, new ones begin around the rows' mean.

New logits begin near the mean logit then, so that the old tokens' probabilities hardly move.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_vocabulary(table: Tensor, size: int, noise: float, generator: torch.Generator) -> Tensor:
    """(V, ...) -> (size, ...), fp32 or wider: new rows are the mean of all rows, and `noise` times their standard
    deviation, feature by feature, drawn around it."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    return torch.cat([table, draw_around_mean(table, size - table.shape[0], noise, generator)])


def draw_around_mean(table: Tensor, more: int, noise: float, generator: torch.Generator) -> Tensor:
    """(V, ...) -> (more, ...): such rows."""
    wide = table.double()
    mean, deviation = wide.mean(dim=0), wide.std(dim=0)
    drawn = torch.randn(more, *table.shape[1:], generator=generator, dtype=torch.float64)
    return (mean + noise * deviation * drawn).to(table)
