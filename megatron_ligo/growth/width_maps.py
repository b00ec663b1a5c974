"""Width maps: the map of each axis, its lift over heads, and its application.

Legend: n features of an axis, N of the large one; G groups of KV heads, r query heads a group, d head size.
A map is always given as (large, small): `expand` itself, or the transpose of `contract`.

LiGO, equation 6: W_large = B (sum_i w_i W_i) A^T. B is the `expand` of the space that the weight writes, A^T is the
`contract` of the space that it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import SINK_SPACE, Axis, Heads, ParamSpec, Role, Use, axis_size
from megatron_ligo.growth import attention_heads, experts
from megatron_ligo.growth.linear_maps import LinearMap, RowSelection

# Spaces whose features are distinct items, which no map may mix.
UNMAPPED_SPACES = ("vocab", "position", "token_type", "register", "order", "channel", "pixel", "head_feature", "score")
WHOLE_HEADS = ("groups", "heads")  # maps whose entries are heads
HEAD_MAPS = (*WHOLE_HEADS, "q", "k")  # the maps of queries and keys
ROWS_AT_ONCE = 512  # of a map, in fp64


@dataclass(frozen=True)
class LiftedMap:
    """A width map, lifted to the features of an axis.

    unit: number of consecutive features that each entry acts on: H ⊗ I_unit.
    repeat, head_dim: with repeat > 1 the features are (G, repeat, d), and the map acts on (G, d) jointly.
    inner: (d2, d1), the map of the features within each head if the head size changes.
    """

    map_name: str
    unit: int = 1
    repeat: int = 1
    head_dim: int = 1
    inner: Tensor | None = field(default=None, compare=False)

    @property
    def is_plain(self) -> bool:
        """True if the map acts on single features."""
        return self.unit == 1 and self.repeat == 1 and self.inner is None


@dataclass(frozen=True)
class MapSpec:
    """One width map.

    small, large: its sizes. is_sharded: tensor parallelism shards its large side. is_read: some parameter reads the
    space. outside_layers: some parameter outside the layers uses the map.
    """

    name: str
    small: int
    large: int
    is_sharded: bool
    is_read: bool
    outside_layers: bool


@dataclass(frozen=True)
class SpaceMaps:
    """The map of each axis, given both models and the structure of attention maps.

    structure: "heads" or "dense". With "heads" the map `groups` acts on whole KV groups with their query heads. If the
    number of query heads a group changes, `groups` acts on keys and values, and `heads` on the query heads. With
    "dense", maps act on single features.
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

    @property
    def _head_growth(self) -> attention_heads.HeadGrowth:
        is_normalised = architectures.get(self.large.arch).normalises_queries(self.large)
        return attention_heads.HeadGrowth.between(self.small, self.large, is_normalised)

    def head_gain_map(self, part: str, dual: bool = False) -> Tensor:
        """Returns the map of the gains of one head of queries or keys (part q or k), (d2, d1), fp64."""
        gain_map = attention_heads.dual_head_gain_map if dual else attention_heads.head_gain_map
        return gain_map(part, self._head_growth)

    def inner_gain_map(self, param: ParamSpec, dual: bool = False) -> Tensor | None:
        """Returns the map (d2, d1) of the gains of each head's norm if the head size changes; None for others."""
        if param.axes[0].space != "head_feature" or not self.head_dim_changed:
            return None
        return self.head_gain_map("q" if param.role is Role.QUERY_NORM else "k", dual)

    def lift(self, axis: Axis, dual: bool = False) -> LiftedMap | None:
        """Returns the lifted map of an axis; None if its space does not grow. dual: for gradients."""
        if axis.space in UNMAPPED_SPACES:
            return None
        if axis.heads is Heads.NONE:
            return LiftedMap(architectures.get(self.large.arch).space(axis, self.large))
        return self._lift_whole_heads(axis, dual) if self.structure == "heads" else self._lift_dense_heads(axis)

    def _lift_whole_heads(self, axis: Axis, dual: bool) -> LiftedMap:
        small, has_query_heads = self.small, axis.heads is Heads.Q
        inner, head_dim = None, self.small.head_dim
        if axis.space == SINK_SPACE:
            head_dim = 1
        elif self.head_dim_changed and axis.use is Use.GAIN:
            inner = self.head_gain_map("q" if has_query_heads else "k", dual)
        elif self.head_dim_changed:
            if axis.space == "qk":
                part = "q" if has_query_heads else "k"
            else:
                part = "o" if axis.use is Use.INPUT else "v"
            feature_map = attention_heads.dual_head_feature_map if dual else attention_heads.head_feature_map
            inner = feature_map(part, self._head_growth)
        if self.gqa_ratio_changed and has_query_heads:
            return LiftedMap("heads", unit=head_dim, inner=inner)
        heads_per_entry = small.heads_per_group if has_query_heads else 1
        return LiftedMap("groups", unit=head_dim * heads_per_entry, inner=inner)

    def _lift_dense_heads(self, axis: Axis) -> LiftedMap:
        has_query_heads = axis.heads is Heads.Q
        if axis.space == "qk":
            return LiftedMap("q" if has_query_heads else "k")
        repeat = self.large.heads_per_group if has_query_heads else 1
        return LiftedMap(axis.space, repeat=repeat, head_dim=self.large.head_dim)

    def map_specs(self, arch: Architecture) -> dict[str, MapSpec]:
        """Returns every width map, by name, in the order of their first use by the family's parameters."""
        specs: dict[str, MapSpec] = {}
        for param in arch.params:
            if not param.exists(self.large):
                continue
            for dim, axis in enumerate(param.axes):
                lift = self.lift(axis)
                if lift is None:
                    continue
                known = specs.get(lift.map_name)
                specs[lift.map_name] = MapSpec(
                    lift.map_name,
                    self._num_entries(axis, lift, self.small),
                    self._num_entries(axis, lift, self.large),
                    is_sharded=param.tp_dim == dim or (known is not None and known.is_sharded),
                    is_read=axis.use is Use.INPUT or (known is not None and known.is_read),
                    outside_layers=not param.in_layer or (known is not None and known.outside_layers),
                )
        return specs

    def _num_entries(self, axis: Axis, lift: LiftedMap, model_config: ModelConfig) -> int:
        if lift.map_name in WHOLE_HEADS:
            return model_config.num_heads if lift.map_name == "heads" else model_config.num_kv_heads
        shards = experts.num_shards(self.small, model_config) if lift.map_name == "ffn" else 1
        return axis_size(axis, model_config) // lift.repeat * shards


def apply_map(x: Tensor, dim: int, matrix: Tensor | LinearMap, lift: LiftedMap) -> Tensor:
    """Applies a lifted map to one dim of a tensor: (..., n, ...) -> (..., N, ...)."""
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
    added_rows: Tensor | None = None,
) -> Tensor:
    """Grows a parameter from its depth-mixed small tensor: (out small, in small) -> (out large, in large).

    matrix(lift, use): the (large, small) matrix of a map for that use. With only one rank's rows of it, the result is
    that rank's shard of the grown tensor.
    added_rows: (out large, in small), added between the two maps.
    Copied gains of norms (Use.GAIN) grow by `Operator.grow_gain` instead.
    """
    inner = space_maps.inner_gain_map(param)
    if inner is not None:
        return inner.to(mixed) @ mixed
    lifts = [space_maps.lift(axis) for axis in param.axes]
    maps = [lift and matrix(lift, axis.use) for lift, axis in zip(lifts, param.axes, strict=True)]
    if added_rows is None and _is_input_side_first_cheaper(mixed, maps):
        mixed, maps[1] = apply_map(mixed, 1, maps[1], lifts[1]), None
    for dim, (width_map, lift) in enumerate(zip(maps, lifts, strict=True)):
        if width_map is not None:
            mixed = apply_map(mixed, dim, width_map, lift)
        if dim == 0 and added_rows is not None:
            mixed = mixed + added_rows
    return mixed


def _is_input_side_first_cheaper(mixed: Tensor, maps: Sequence[Tensor | LinearMap | None]) -> bool:
    """True if mapping dim 1 before dim 0 takes fewer multiplications. mixed: (out small, in small).

    Never for maps without sums: they need no products, and their order would change the last bits for nothing.
    """
    if len(maps) != 2 or not all(isinstance(each, LinearMap) and each.cost for each in maps):
        return False
    # Per vector along each dim, whole heads moved by one entry of their map included.
    costs = [each.cost * size // each.shape[1] for each, size in zip(maps, mixed.shape, strict=True)]
    grown = [size * each.shape[0] // each.shape[1] for each, size in zip(maps, mixed.shape, strict=True)]
    return costs[1] * mixed.shape[0] + costs[0] * grown[1] < costs[0] * mixed.shape[1] + costs[1] * grown[0]


def left_inverse(expand: Tensor) -> Tensor:
    """Returns the pseudo-inverse of a map: (large, small) -> (small, large).

    It is exact for maps whose rows have at most one entry (all copies): each small feature is the mean of its copies,
    weighted by their scales. Other maps are inverted by SVD.
    """
    if _has_lone_entries(expand):
        weight = (expand * expand).sum(dim=0)
        if bool((weight > 0).all()):
            return (expand / weight).t().contiguous()
    return torch.linalg.pinv(expand.double()).to(expand.dtype)


def _has_lone_entries(expand: Tensor) -> bool:
    """True if no row of a map (large, small) has two entries."""
    return bool(((expand != 0).sum(dim=1) <= 1).all())


def remove_visible(drawn: Tensor, expand: Tensor, contract: Tensor) -> Tensor:
    """Returns drawn - (drawn @ expand) @ contract, which vanishes behind `expand`. Changes `drawn`.

    drawn: (n, large), contract: (small, large), a left inverse of expand (large, small). A map without sums needs no
    product: for 8,192 to 11,008 features the two would take a core two minutes.
    """
    if not _has_lone_entries(expand):
        return drawn - (drawn @ expand) @ contract
    source = expand.abs().argmax(dim=1)
    rows = torch.arange(len(expand))
    scale, share = expand[rows, source], contract[source, rows]
    for part in drawn.split(ROWS_AT_ONCE):
        sums = part.new_zeros(len(part), expand.shape[1]).index_add_(1, source, part * scale)
        part -= sums[:, source] * share
    return drawn
