"""Where an operator starts: one small function for each named initialisation.

A width initialisation is `f(small, large, space, generator) -> expand` (large x small, fp64). A depth
initialisation is `f(small_layers, large_layers, writes) -> (large_layers x small_layers)`, where `writes` says
that the row's output is added to the residual stream. A new one is one function and its line in the table below.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _one_hot(source: Tensor, small: int) -> Tensor:
    return torch.nn.functional.one_hot(source, small).double()


def copy(small: int, large: int, space: str, generator: torch.Generator) -> Tensor:
    """Feature i copies feature i mod small, unscaled (Net2Net's plain duplication, in order)."""
    return _one_hot(torch.arange(large) % small, small)


def lossless(small: int, large: int, space: str, generator: torch.Generator) -> Tensor:
    """As `copy`; in the residual stream copies are divided by the square root of their number.

    expand^T expand = I then, so a norm's statistics survive any ratio, and the left inverse is expand^T.
    """
    expand = copy(small, large, space, generator)
    if space == "residual":
        expand = expand / expand.sum(dim=0).sqrt()
    return expand


def random(small: int, large: int, space: str, generator: torch.Generator) -> Tensor:
    """Identity above rows drawn from U(0, 1) and divided by their sum (official LiGO's `rand`)."""
    rows = torch.rand(large - small, small, generator=generator, dtype=torch.float64)
    return torch.cat([torch.eye(small, dtype=torch.float64), rows / rows.sum(dim=1, keepdim=True)])


def stack(small: int, large: int, writes: bool) -> Tensor:
    """Layer j is layer j mod small: the small network again on top of itself (StackBERT, G_stack)."""
    return _one_hot(torch.arange(large) % small, small)


def interlace(small: int, large: int, writes: bool) -> Tensor:
    """Layer j is layer floor(j small / large): each layer beside its copies, at any ratio."""
    return _one_hot(torch.arange(large) * small // large, small)


def copy_last(small: int, large: int, writes: bool) -> Tensor:
    """Layers in order, then the last one again."""
    return _one_hot(torch.arange(large).clamp(max=small - 1), small)


def lossless_depth(small: int, large: int, writes: bool) -> Tensor:
    """As `interlace`, with nothing written to the residual stream by the second and later copies of a layer."""
    weights = interlace(small, large, writes)
    if writes:
        source = weights.argmax(dim=1)
        weights[1:][source[1:] == source[:-1]] = 0
    return weights


WIDTH = {"copy": copy, "lossless": lossless, "random": random}
DEPTH = {"copy": copy_last, "stack": stack, "interlace": interlace, "lossless": lossless_depth}
