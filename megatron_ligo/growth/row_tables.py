"""Growth of tables whose rows are distinct items: tokens (or labels), and learned positions.

Vocabulary. Tokens of the small model keep their rows, and new rows start near the mean of all rows. The logits of new
tokens then start near the mean logit, which hardly changes the old tokens' probabilities.

Positions. A longer context appends positions. The old ones are unchanged, so every start is lossless within their
length:

    tile      the old positions, repeated in order (Longformer, arXiv 2004.05150)
    mean      their mean
    random    drawn around their mean, with their standard deviation

A larger image interpolates the patches' positions as transformers does (bicubic, corners not aligned).

The first layer of some models lacks a norm that their other layers have: it computes as with a gain of 1.

Legend: V tokens or labels, P positions of the small model, n features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec, Use, layer_index


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


def extend_positions(table: Tensor, size: int, first: int, start: str, generator: torch.Generator) -> Tensor:
    """Appends positions: (P, n) -> (size, n), in fp32 or wider.

    first: the row of a sequence's first token. New positions do not use the rows before it (RoBERTa has some).
    start: tile, mean or random.
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    num_added, used = size - table.shape[0], table[first:]
    if start == "tile":
        return torch.cat([table, used[torch.arange(num_added) % len(used)]])
    return torch.cat([table, draw_around_mean(used, num_added, float(start == "random"), generator)])


def interpolate_positions(table: Tensor, small: ModelConfig, large: ModelConfig) -> Tensor:
    """Interpolates the positions of an image's patches: (P, n) -> (tokens of a large image, n), in fp32 or wider.

    Special tokens keep their positions.
    """
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    small_side, large_side = small.patches_per_side, large.patches_per_side
    special, patches = table.split([len(table) - small_side**2, small_side**2])
    grid = patches.reshape(1, small_side, small_side, -1).permute(0, 3, 1, 2)
    antialias = architectures.get(small.arch).antialiases_positions
    size = large_side, large_side
    grown = F.interpolate(grid, size=size, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([special, grown.permute(0, 2, 3, 1).reshape(large_side * large_side, -1)])


def read_or_neutral(param: ParamSpec, small: ModelConfig, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Returns a function that reads a small layer's key, and for the first layer, which has none, what it computes as.

    That is a gain of 1 or a bias of 0, of the parameter's own shape.
    """
    neutral = torch.full(param.shape(small), float(param.axes[0].use is Use.GAIN))
    return lambda key: read(key) if layer_index(key) else neutral
