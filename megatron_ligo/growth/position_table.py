"""More learned positions.

A longer context: the small model's positions stay, so that any start of the new ones is lossless within its length:

    tile      the old ones once more, in turn (Longformer, arXiv 2004.05150)
    mean      their mean
    random    around their mean, with their deviation

A larger image: the patches' positions are interpolated as transformers does it (bicubic, corners not aligned).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.growth.vocabulary import draw_around_mean


def extend_positions(table: Tensor, size: int, first: int, start: str, generator: torch.Generator) -> Tensor:
    """(P, n) -> (size, n), fp32 or wider. start: one of the three above; first: the row of a sequence's first token
    (RoBERTa's table has rows before it: of those the new ones take nothing)."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    more, used = size - table.shape[0], table[first:]
    if start == "tile":
        return torch.cat([table, used[torch.arange(more) % len(used)]])
    return torch.cat([table, draw_around_mean(used, more, float(start == "random"), generator)])


def interpolate_positions(table: Tensor, small: ModelConfig, large: ModelConfig) -> Tensor:
    """(positions, features) of the small image's tokens -> those of the large one's, fp32 or wider. Special tokens
    keep theirs."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    special, patches = table.split([small.special_tokens, len(table) - small.special_tokens])
    before, after = small.patches_a_side, large.patches_a_side
    square = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    wide = F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([special, wide.permute(0, 2, 3, 1).reshape(after * after, -1)])
