"""The width maps: which map an axis meets, how it is lifted over heads, and how it is applied.

Legend: n features of an axis, N of the large one; G groups of KV heads, r query heads a group, d head size.
A map is always given as (large x small): `expand` itself, or the transpose of `contract`.

Paper (LiGO, eq. 6): W_large = B (sum_i w_i W_i) A^T. B is `expand` on the side that writes a space, A^T is
`contract` on the side that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Axis, Heads, ParamSpec, Use, axis_size
from megatron_ligo.growth import attention_heads
from megatron_ligo.growth.linear_maps import LinearMap, RowSelection

# Spaces whose features are names: they keep their meaning.
UNGROWN = ("vocab", "position", "token_type", "order", "channel", "pixel")
WHOLE_HEADS = ("groups", "heads")  # maps whose entries are heads


@dataclass(frozen=True)
class LiftedMap:
    """How a map of `small` entries moves an axis: entries of `unit` consecutive features (H x I_unit), or,
    with `repeat` > 1, features (G, repeat, d) of which the map moves (G, d) jointly. `inner` (d2 x d1) then moves
    the features within each head, where heads change their size."""

    map_name: str
    unit: int = 1
    repeat: int = 1
    head_dim: int = 1
    inner: Tensor | None = field(default=None, compare=False)

    @property
    def is_plain(self) -> bool:
        """True where the map itself, as it is, moves the axis."""
        return self.unit == 1 and self.repeat == 1 and self.inner is None


@dataclass(frozen=True)
class MapSpec:
    """One width map: its sizes, whether tensor parallelism cuts its large side, whether anyone reads the space,
    whether a row outside the layers meets it."""

    name: str
    small: int
    large: int
    is_sharded: bool
    is_read: bool
    outside_layers: bool


@dataclass(frozen=True)
class SpaceMaps:
    """Both models' sizes and how their heads move: from these it follows which map an axis meets.

    structure "heads": the map `groups` moves whole KV groups with their query heads; where the number of query heads a
    group changes, `groups` moves keys and values, and `heads` the query heads. "dense": maps of single features.
    """

    small: ModelConfig
    large: ModelConfig
    structure: str

    @property
    def gqa_ratio_changed(self) -> bool:
        return self.small.heads_per_group != self.large.heads_per_group

    @property
    def head_dim_changed(self) -> bool:
        return self.small.head_dim != self.large.head_dim

    def lift(self, axis: Axis, dual: bool = False) -> LiftedMap | None:
        """The map that an axis meets and its lift; None where the space does not grow. dual: for gradients."""
        if axis.space in UNGROWN:
            return None
        if axis.heads is Heads.NONE:
            return LiftedMap(architectures.get(self.large.arch).space(axis, self.large))
        return self._whole_heads(axis, dual) if self.structure == "heads" else self._dense_heads(axis)

    def _whole_heads(self, axis: Axis, dual: bool) -> LiftedMap:
        small = self.small
        of_query_heads = axis.heads is Heads.Q
        inner = None
        if self.head_dim_changed:
            # Values are written by KV heads and read by query heads; of the two, only what is read is o's.
            part = ("q" if of_query_heads else "k") if axis.space == "qk" else ("o" if axis.use is Use.INPUT else "v")
            within = attention_heads.dual_head_feature_map if dual else attention_heads.head_feature_map
            inner = within(part, small.head_dim, self.large.head_dim, small.rope_base is not None)
        if self.gqa_ratio_changed and of_query_heads:
            return LiftedMap("heads", unit=small.head_dim, inner=inner)
        return LiftedMap("groups", unit=small.head_dim * (small.heads_per_group if of_query_heads else 1), inner=inner)

    def _dense_heads(self, axis: Axis) -> LiftedMap:
        of_query_heads = axis.heads is Heads.Q
        if axis.space == "qk":
            return LiftedMap("q" if of_query_heads else "k")
        return LiftedMap(
            axis.space, repeat=self.large.heads_per_group if of_query_heads else 1, head_dim=self.large.head_dim
        )

    def map_specs(self, arch: Architecture) -> dict[str, MapSpec]:
        """Every width map, by name, in the order in which the table first meets them."""
        specs: dict[str, MapSpec] = {}
        for param in arch.params:
            if not param.exists(self.large):
                continue
            for dim, axis in enumerate(param.axes):
                lift = self.lift(axis)
                if lift is None:
                    continue
                known = specs.get(lift.map_name)
                read = axis.use is Use.INPUT or (known is not None and known.is_read)
                sizes = self._entries(axis, lift, self.small), self._entries(axis, lift, self.large)
                split = param.tp_dim == dim or (known is not None and known.is_sharded)
                outside = not param.in_layer or (known is not None and known.outside_layers)
                specs[lift.map_name] = MapSpec(lift.map_name, *sizes, split, read, outside)
        return specs

    @staticmethod
    def _entries(axis: Axis, lift: LiftedMap, model_config: ModelConfig) -> int:
        if lift.map_name in WHOLE_HEADS:
            return model_config.num_heads if lift.map_name == "heads" else model_config.num_kv_heads
        return axis_size(axis, model_config) // lift.repeat


def apply_map(x: Tensor, dim: int, matrix: Tensor | LinearMap, lift: LiftedMap) -> Tensor:
    """x with axis `dim` moved through `matrix` (N x n), in the features' own order."""
    if isinstance(matrix, LinearMap) and lift.is_plain and dim == x.dim() - 1:
        return matrix.apply(x)
    if isinstance(matrix, RowSelection) and lift.repeat == 1 and lift.inner is None:
        return matrix.select(x.unflatten(dim, (matrix.shape[1], -1)), dim).flatten(dim, dim + 1)
    x = x.movedim(dim, 0)
    rest = x.shape[1:]
    if lift.repeat > 1:
        r, d = lift.repeat, lift.head_dim
        grouped = x.reshape(-1, r, d, *rest).transpose(1, 2)
        moved = matrix @ grouped.reshape(matrix.shape[1], -1)
        out = moved.reshape(-1, d, r, *rest).transpose(1, 2)
    else:
        out = matrix @ x.reshape(matrix.shape[1], -1)
    if lift.inner is not None:
        out = lift.inner.to(out) @ out.reshape(-1, lift.inner.shape[1], math.prod(rest))
    return out.reshape(-1, *rest).movedim(0, dim)


def grow_tensor(
    param: ParamSpec,
    mixed: Tensor,
    matrix: Callable[[LiftedMap, Use], Tensor | LinearMap],
    space_maps: SpaceMaps,
    joined: Tensor | None = None,
) -> Tensor:
    """A row's grown tensor from its depth-mixed small one.

    matrix(lift, use) gives the (large x small) matrix of a map for that use (all its rows, or one rank's):
    growing a shard is growing with fewer rows. joined: added to a matrix (large out, small in) between its maps.
    Norm gains (Use.SCALES) are `operator.grow_gain`'s.
    """
    for dim, axis in enumerate(param.axes):
        lift = space_maps.lift(axis)
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
