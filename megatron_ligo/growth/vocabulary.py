"""Growth of the vocabulary: tokens of the small model keep their rows, and new rows start near the mean of all rows.

The logits of new tokens then start near the mean logit, which hardly changes the old tokens' probabilities.

Legend: V tokens (or labels) of the small model, n features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extend_vocabulary(table: Tensor, size: int, noise: float, generator: torch.Generator) -> Tensor:
    """Appends rows drawn around the mean of all rows: (V, n) or (V,) -> (size, n) or (size,), in fp32 or wider.

    noise: the new rows' standard deviation, in units of the existing rows', feature by feature.
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    return torch.cat([table, draw_around_mean(table, size - table.shape[0], noise, generator)])


def draw_around_mean(table: Tensor, num_rows: int, noise: float, generator: torch.Generator) -> Tensor:
    """Draws new rows of a table: (V, n) or (V,) -> (num_rows, n) or (num_rows,), in the table's dtype."""
    wide = table.double()
    mean, deviation = wide.mean(dim=0), wide.std(dim=0)
    drawn = torch.randn(num_rows, *table.shape[1:], generator=generator, dtype=torch.float64)
    return (mean + noise * deviation * drawn).to(table)
