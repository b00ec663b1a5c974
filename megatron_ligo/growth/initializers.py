"""Initialisations of an operator's maps: one function per name.

A width initialisation is `f(small, large, norm, generator) -> expand`, (large, small) in fp64. norm: the kind of norm
of the space ("rms", "layer", or "" if there is none).

A depth initialisation is `f(small, large, role, generator) -> weights`, (large layers, small layers) in fp64. role: the
parameter's role in its layer: WRITES (its output is added to the residual stream), SCALES (a norm's gain) or INNER.

To add one, write its function and list it in a table at the end of this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

WRITES, SCALES, INNER = "writes", "scales", "inner"
NOISE = 0.03  # upper bound of the noise that official LiGO adds to each depth weight


def one_hot(source: Tensor, small: int) -> Tensor:
    """Returns the one-hot rows of `source`: (len(source), small), fp64."""
    return torch.nn.functional.one_hot(source, small).double()


def _divide_by_root_copies(expand: Tensor, norm: str) -> Tensor:
    """Divides copies by the square root of their number under an RMSNorm: (large, small) -> (large, small).

    Then expand^T expand = I: the norm's statistics are preserved at any ratio, and expand^T is a left inverse. Only
    whole copies preserve a LayerNorm's statistics.
    """
    return expand / expand.sum(dim=0).sqrt() if norm == "rms" else expand


def copy(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Copies feature i mod small to feature i, unscaled (plain duplication). (large, small)."""
    return one_hot(torch.arange(large) % small, small)


def lossless(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """`copy`, with copies divided by the square root of their number under an RMSNorm. (large, small)."""
    return _divide_by_root_copies(copy(small, large, norm, generator), norm)


def clone(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """`copy` at whole multiples (HyperCloning), `lossless` at other ratios, where `copy` is inexact. (large, small)."""
    return (lossless if large % small else copy)(small, large, norm, generator)


def select(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Copies randomly drawn features to the new ones, unscaled (Net2Net, bert2BERT's FPI). (large, small)."""
    drawn = torch.randint(small, (large - small,), generator=generator)
    return one_hot(torch.cat([torch.arange(small), drawn]), small)


def net2net(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """`select`, with copies divided by the square root of their number under an RMSNorm. (large, small).

    Under a LayerNorm each feature is drawn equally often if the sizes allow it, which preserves mean and variance.
    """
    if norm == "layer" and large % small == 0:
        drawn = [torch.randperm(small, generator=generator) for _ in range(large // small - 1)]
        return one_hot(torch.cat([torch.arange(small), *drawn]), small)
    return _divide_by_root_copies(select(small, large, norm, generator), norm)


def pad(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Leaves new features zero and unread, to be filled with random numbers. (large, small)."""
    return torch.eye(large, small, dtype=torch.float64)


def mean(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Averages consecutive KV heads into fewer ones (multi-head to grouped-query). (large, small)."""
    return one_hot(torch.arange(small) * large // small, large).T * (large / small)


def random(small: int, large: int, norm: str, generator: torch.Generator) -> Tensor:
    """Identity above rows drawn from U(0, 1) and normalised to sum 1 (official LiGO's `rand`). (large, small)."""
    rows = torch.rand(large - small, small, generator=generator, dtype=torch.float64)
    return torch.cat([torch.eye(small, dtype=torch.float64), rows / rows.sum(dim=1, keepdim=True)])


def stack(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layer j copies layer j mod small (StackBERT, G_stack). (large, small)."""
    return one_hot(torch.arange(large) % small, small)


def stack_noisy(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """`stack` with U(0, 0.03) added to every weight, and rows normalised to sum 1 (official LiGO). (large, small)."""
    drawn = torch.rand(large, small, generator=generator, dtype=torch.float64)
    weights = stack(small, large, role, generator) + NOISE * drawn
    return weights / weights.sum(dim=1, keepdim=True)


def interlace(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layer j copies layer floor(j small / large): copies follow their layer, at any ratio. (large, small)."""
    return one_hot(torch.arange(large) * small // large, small)


def copy_last(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """Layers in order, then copies of the last one. (large, small)."""
    return one_hot(torch.arange(large).clamp(max=small - 1), small)


def lossless_depth(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """`interlace`, with the residual-stream outputs of later copies of a layer set to zero. (large, small)."""
    weights = interlace(small, large, role, generator)
    if role == WRITES:
        weights[later_copy_mask(small, large)] = 0
    return weights


def pad_depth(small: int, large: int, role: str, generator: torch.Generator) -> Tensor:
    """`interlace`, with all but the gains of later copies of a layer set to zero, to be filled with random numbers.

    (large, small).
    """
    weights = interlace(small, large, role, generator)
    if role != SCALES:
        weights[later_copy_mask(small, large)] = 0
    return weights


def later_copy_mask(small: int, large: int) -> Tensor:
    """Marks the large layers that are second or later copies under `interlace`. (large,), bool."""
    source = torch.arange(large) * small // large
    return torch.cat([torch.zeros(1, dtype=torch.bool), source[1:] == source[:-1]])


SCALED_COPIES = ("lossless", "clone", "net2net")  # under an RMSNorm
DENSE_INITS = ("random",)  # have rows with several entries
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
