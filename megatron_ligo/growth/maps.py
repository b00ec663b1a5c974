"""The width maps: which map an axis meets, how it is lifted over heads, and how it is applied.

Legend: n features of an axis, N of the large one; G groups of KV heads, r query heads a group, d head size.
A map is always given as (large x small): `expand` itself, or the transpose of `contract`.

Paper (LiGO, eq. 6): W_large = B (sum_i w_i W_i) A^T. B is `expand` on the side that writes a space, A^T is
`contract` on the side that reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.dims import Dims
from megatron_ligo.arch.rows import Architecture, Axis, Heads, Row, Use, axis_size

UNGROWN = ("vocab", "position", "token_type", "order")  # spaces whose features are names: they keep their meaning


@dataclass(frozen=True)
class Lift:
    """How a map of `small` entries moves an axis: entries of `unit` consecutive features (H x I_unit), or,
    with `repeat` > 1, features (G, repeat, d) of which the map moves (G, d) jointly."""

    map: str
    unit: int = 1
    repeat: int = 1
    head_dim: int = 1


@dataclass(frozen=True)
class MapSpec:
    """One width map: its sizes, whether tensor parallelism cuts its large side, whether anyone reads the space,
    whether a row outside the layers meets it."""

    name: str
    small: int
    large: int
    split: bool
    read: bool
    outside: bool


def lift_of(axis: Axis, dims: Dims, structure: str) -> Lift | None:
    """The map that an axis meets and its lift; None where the space does not grow. dims: small or large."""
    if axis.space in UNGROWN:
        return None
    if axis.heads is Heads.NONE:
        return Lift(architectures.get(dims.arch).space(axis, dims))
    of_query_heads = axis.heads is Heads.Q
    if structure == "heads":
        return Lift("groups", unit=dims.head_dim * (dims.heads_per_group if of_query_heads else 1))
    if axis.space == "qk":
        return Lift("q" if of_query_heads else "k")
    repeat = dims.heads_per_group if of_query_heads else 1
    return Lift(axis.space, repeat=repeat, head_dim=dims.head_dim)


def map_specs(arch: Architecture, small: Dims, large: Dims, structure: str) -> dict[str, MapSpec]:
    """Every width map of a growth, by name, in the order in which the table first meets them."""
    specs: dict[str, MapSpec] = {}
    for row in arch.rows:
        if not row.exists(large):
            continue
        for dim, axis in enumerate(row.axes):
            lift = lift_of(axis, large, structure)
            if lift is None:
                continue
            per_entry = lift.unit * lift.repeat
            known = specs.get(lift.map)
            read = axis.use is Use.READS or (known is not None and known.read)
            split = row.split == dim or (known is not None and known.split)
            outside = not row.in_layer or (known is not None and known.outside)
            sizes = axis_size(axis, small) // per_entry, axis_size(axis, large) // per_entry
            specs[lift.map] = MapSpec(lift.map, *sizes, split, read, outside)
    return specs


def apply_map(x: Tensor, dim: int, matrix: Tensor, lift: Lift) -> Tensor:
    """x with axis `dim` moved through `matrix` (N x n), in the features' own order."""
    x = x.movedim(dim, 0)
    rest = x.shape[1:]
    if lift.repeat > 1:
        r, d = lift.repeat, lift.head_dim
        grouped = x.reshape(-1, r, d, *rest).transpose(1, 2)
        moved = matrix @ grouped.reshape(matrix.shape[1], -1)
        out = moved.reshape(-1, d, r, *rest).transpose(1, 2)
    else:
        out = matrix @ x.reshape(matrix.shape[1], -1)
    return out.reshape(-1, *rest).movedim(0, dim)


def grow_row(
    row: Row,
    mixed: Tensor,
    matrix: Callable[[Lift, Use], Tensor],
    dims: Dims,
    structure: str,
    joined: Tensor | None = None,
) -> Tensor:
    """A row's grown tensor from its depth-mixed small one.

    matrix(lift, use) gives the (large x small) matrix of a map for that use (all its rows, or one rank's):
    growing a shard is growing with fewer rows. joined: added to a matrix (large out, small in) between its maps.
    Norm gains (Use.SCALES) are `operator.grow_gain`'s.
    """
    for dim, axis in enumerate(row.axes):
        lift = lift_of(axis, dims, structure)
        if lift is not None:
            mixed = apply_map(mixed, dim, matrix(lift, axis.use), lift)
        if dim == 0 and joined is not None:
            mixed = mixed + joined
    return mixed


def left_inverse(expand: Tensor) -> Tensor:
    """The pseudo-inverse (small x large) of a map whose rows have at most one entry, exactly; of any map by SVD.

    One-entry maps are everywhere (copies), and their pseudo-inverse needs no factorisation: each small
    feature is the average of its copies weighted by their scales.
    """
    if bool(((expand != 0).sum(dim=1) <= 1).all()):
        weight = (expand * expand).sum(dim=0)
        if bool((weight > 0).all()):
            return (expand / weight).t().contiguous()
    return torch.linalg.pinv(expand.double()).to(expand.dtype)
