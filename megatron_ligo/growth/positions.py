"""A larger image: the patches' positions are interpolated as transformers does it (bicubic, corners not aligned)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ligo.arch.dims import Dims


def interpolate(table: Tensor, small: Dims, large: Dims) -> Tensor:
    """(positions, features) of the small image's tokens -> those of the large one's, fp32 or wider. Special tokens
    keep theirs."""
    table = table.to(torch.promote_types(table.dtype, torch.float32))
    special, patches = table.split([small.special_tokens, len(table) - small.special_tokens])
    before, after = small.patches_a_side, large.patches_a_side
    square = patches.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    wide = F.interpolate(square, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([special, wide.permute(0, 2, 3, 1).reshape(after * after, -1)])
