"""Where an operator starts: one small function for each named initialisation.

A width initialisation is `f(small, large, norm, generator) -> expand` (large x small, fp64), with the kind of norm that
reads the space ("rms", "layer", or "" where none does). A depth initialisation is
`f(small_layers, large_layers, role, generator) -> (large_layers x small_layers)`, with the role of the row in its
layer: WRITES (its output is added to the residual stream), SCALES (a norm's gain), INNER. A new one is one function and
its line in the table below.
"""

from __future__ import annotations

import torch
from torch import Tensor

WRITES, SCALES, INNER = "writes", "scales", "inner"
NOISE = 0.03  # the most that official LiGO adds to each weight of a noisy depth map


def one_hot(source: Tensor, small: int) -> Tensor:
    """Row i has its one at source[i]."""
    return torch.nn.functional.one_hot(source, small).double()


def _divide_by_root_copies(expand: Tensor, norm: str) -> Tensor:
    """Before an RMSNorm: copies divided by the square root of their number, so that expand^T expand = I.

    Its statistics survive any ratio then, and the left inverse is expand^T. A LayerNorm's survive whole copies only.
    """
    return expand / expand.sum(dim=0).sqrt() if norm == "rms" else expand


def copy(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Feature i copies feature i mod small, unscaled (plain duplication, in order)."""
    return one_hot(torch.arange(large) % small, small)


def lossless(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """As `copy`; before an RMSNorm copies are divided by the square root of their number."""
    return _divide_by_root_copies(copy(small, large, norm, generator), norm)


def clone(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """As `copy` at whole multiples (HyperCloning); as `lossless` at ragged ratios, where plain copies lose."""
    return (lossless if large % small else copy)(small, large, norm, generator)


def select(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """New features copy features drawn at random, unscaled (Net2Net, bert2BERT's FPI)."""
    drawn = torch.randint(small, (large - small,), generator=generator)
    return one_hot(torch.cat([torch.arange(small), drawn]), small)


def net2net(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """As `select`; before an RMSNorm copies are divided by the square root of their number. Before a LayerNorm each
    feature is drawn as often as any other where the sizes allow it: its mean and variance are kept then."""
    if norm == "layer" and large % small == 0:
        drawn = [torch.randperm(small, generator=generator) for _ in range(large // small - 1)]
        return one_hot(torch.cat([torch.arange(small), *drawn]), small)
    return _divide_by_root_copies(select(small, large, norm, generator), norm)


def pad(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """New features hold nothing of the small model's and nobody reads them: room for fresh numbers."""
    return torch.eye(large, small, dtype=torch.float64)


def mean(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Fewer KV heads: each is the mean of as many consecutive ones (multi-head to grouped-query attention)."""
    return one_hot(torch.arange(small) * large // small, large).T * (large / small)


def random(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Identity above rows drawn from U(0, 1) and divided by their sum (official LiGO's `rand`)."""
    rows = torch.rand(large - small, small, generator=generator, dtype=torch.float64)
    return torch.cat([torch.eye(small, dtype=torch.float64), rows / rows.sum(dim=1, keepdim=True)])


def stack(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layer j is layer j mod small: the small network again on top of itself (StackBERT, G_stack)."""
    return one_hot(torch.arange(large) % small, small)


def stack_noisy(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """As `stack` with U(0, 0.03) added to every weight, divided by their sum (official LiGO's start)."""
    drawn = torch.rand(large, small, generator=generator, dtype=torch.float64)
    weights = stack(small, large, role, generator) + NOISE * drawn
    return weights / weights.sum(dim=1, keepdim=True)


def interlace(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layer j is layer floor(j small / large): each layer beside its copies, at any ratio."""
    return one_hot(torch.arange(large) * small // large, small)


def copy_last(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layers in order, then the last one again."""
    return one_hot(torch.arange(large).clamp(max=small - 1), small)


def lossless_depth(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """As `interlace`, with nothing written to the residual stream by the second and later copies of a layer."""
    weights = interlace(small, large, role, generator)
    if role == WRITES:
        weights[later_copy_mask(small, large)] = 0
    return weights


def pad_depth(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """As `interlace`, with nothing but their norms' gains in the second and later copies of a layer: room for fresh
    layers."""
    weights = interlace(small, large, role, generator)
    if role != SCALES:
        weights[later_copy_mask(small, large)] = 0
    return weights


def later_copy_mask(small: int, large: int) -> Tensor:
    """True for the large layers before which `interlace` has put their source already. (large,), bool."""
    source = torch.arange(large) * small // large
    return torch.cat([torch.zeros(1, dtype=torch.bool), source[1:] == source[:-1]])


DENSE_INITS = ("random",)  # rows with more than one entry
WIDTH_INITS = {
    "copy": copy,
    "lossless": lossless,
    "clone": clone,
    "select": select,
    "net2net": net2net,
    "pad": pad,
    "mean": mean,
    "random": random,
}
DEPTH_INITS = {
    "copy": copy_last,
    "stack": stack,
    "stack_noisy": stack_noisy,
    "interlace": interlace,
    "lossless": lossless_depth,
    "pad": pad_depth,
}
