"""Adam's moments of the grown model: gradients go through the DUAL of the maps that weights go through.

What writes a space grows by expand, and its gradient by what reads that space; what reads a space grows by contract,
and its gradient by expand:

    W_large = expand_out W contract_in          G_large = contract_out^T G expand_in^T

The first moment is a mean of gradients and grows as they do: exactly, where the grown model computes what the small one
does and copies are plain (no noise). The second moment is a mean of squares; it goes through the dual maps squared
entry by entry, which is exact where their rows have one entry. Where rows have several (dense or learned maps, noise),
it takes the entries' gradients for independent: an estimate, and too small where they agree.

Heads: where the copies of a KV group hold unlike query heads, no map of the group's gradient says what reaches the keys
and values of each: theirs are shared out evenly, an estimate. The features that a larger head gives k begin at zero
where rotary positions turn them; elsewhere they are known.

Layers: those that write nothing yet are new, and begin at zero; so do new tokens, new positions and those of a
larger image. Several layers that hold one small layer share its gradient out (the least-squares solution of the chain
rule), which leaves Adam's steps as they were: an estimate, for such a model computes something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Use, key_pattern, layer_index
from megatron_ligo.growth.linear_maps import cheapest_form
from megatron_ligo.growth.operator import Operator, short_key, writes_residual
from megatron_ligo.growth.width_maps import LiftedMap, apply_map

SQUARE = "exp_avg_sq"
GROW, OLD = "grow", "old"  # OLD: features that copy one that is there already begin at zero, like new layers


def find_new_layers(operator: Operator) -> list[int]:
    """The large layers that add nothing to the residual stream."""
    weights = [
        operator.tensor(f"depth.{short_key(param)}")
        for param in operator.arch.layer_params(operator.large)
        if _adds(param)
    ]
    idle = torch.stack([(weight == 0).all(dim=1) for weight in weights]).all(dim=0)
    return idle.nonzero().flatten().tolist()


def find_estimated_maps(operator: Operator) -> list[str]:
    """The maps whose moments are estimates: some row of expand, or of what reads it, has several entries, or several
    layers that write something hold one small layer."""
    found = []
    new = find_new_layers(operator)
    for name in operator.shapes():
        if name.startswith("width"):
            entries = operator.tensor(name)
            rows = entries if name.endswith("expand") else entries.t()
            if bool(((rows != 0).sum(dim=1) > 1).any()):
                found.append(name)
        elif name.startswith("depth"):
            held = operator.tensor(name) != 0
            held[new] = False
            if any(bool((held.sum(dim=dim) > 1).any()) for dim in (0, 1)):
                found.append(name)
    return found


def splits_kv_groups(operator: Operator) -> bool:
    """Whether the moments of k and v are estimates: some copy of a KV group has not the same share of all of the
    group's query heads."""
    if not operator.space_maps.gqa_ratio_changed:
        return False
    small, large = operator.small, operator.large
    for layer in range(large.num_layers) if operator.has_map_per_layer("groups") else [None]:
        matrix = operator.matrix(layer)
        dual = torch.linalg.pinv(matrix(LiftedMap("groups"), Use.OUTPUT).double()).t()
        reads = matrix(LiftedMap("heads"), Use.INPUT).double()
        shares = reads.unflatten(0, (large.num_kv_heads, -1)).sum(dim=1).unflatten(1, (small.num_kv_heads, -1))
        if not torch.allclose(shares, dual[..., None].expand_as(shares), atol=1e-6):
            return True
    return False


def _adds(param: ParamSpec) -> bool:
    return writes_residual(param) and len(param.axes) == 2


class DualMaps:
    """The dual maps of an operator, as one kind of moment needs them (for the second: squared entry by entry)."""

    def __init__(self, operator: Operator, kind: str, policy: str):
        self.operator = operator
        self.squared = kind == SQUARE
        self.only_old = policy == OLD
        self.new = find_new_layers(operator)

    def grow(self, key: str, read: Callable[[str], Tensor]) -> Tensor:
        """A large key's moment from the small ones, which `read` gives by key; fp32 or wider."""
        operator, param, layer = self.operator, self.operator.arch.param(key), layer_index(key)
        if param.axes[0].space == "position" and operator.large.image_size != operator.small.image_size:
            return torch.zeros(param.shape(operator.large))
        grown = self._mix(param, key, layer, read)
        if param.axes[0].use is Use.GAIN and operator.copied_gains:
            return self._gain(param, layer, grown)
        for dim, axis in enumerate(param.axes):
            lift = operator.space_maps.lift(axis, dual=True)
            if lift is not None:
                dual = cheapest_form(self._matrix(param, lift, axis.use, layer).to(grown))
                grown = apply_map(grown, dim, dual, self._within(lift))
        if operator.settings.borrow == "next" and param.in_layer:
            # The new features' rows are another layer's.
            grown[param.shape(operator.small)[0] :] = 0
        return self._with_new_rows(param, grown)

    def _mix(self, param: ParamSpec, key: str, layer: int | None, read: Callable[[str], Tensor]) -> Tensor:
        if layer is None:
            moment = read(key)
            return moment.to(torch.promote_types(moment.dtype, torch.float32))
        weights = self._depth(param)[layer]
        sources = weights.nonzero().flatten().tolist()
        first = read(key_pattern(key).format(sources[0] if sources else 0))
        mixed = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for i in sources:
            mixed.add_(read(key_pattern(key).format(i)).to(mixed), alpha=float(weights[i]))
        return mixed

    def _depth(self, param: ParamSpec) -> Tensor:
        """(large layers, small layers), fp64."""
        weights = self.operator.tensor(f"depth.{short_key(param)}").double()
        kept = torch.ones(len(weights), dtype=torch.bool)
        kept[self.new] = False
        dual = torch.zeros_like(weights)
        dual[kept] = torch.linalg.pinv(weights[kept]).t()
        # pinv leaves rounding where zeros are.
        dual[dual.abs() < 1e-9] = 0
        return self._entries(dual)

    def _matrix(self, param: ParamSpec, lift: LiftedMap, use: Use, layer: int | None) -> Tensor:
        """The (large x small) dual of the matrix that an axis meets."""
        matrix = self.operator.matrix(layer)
        expand = matrix(lift, Use.OUTPUT)
        if use is Use.INPUT:
            dual = expand
        elif not self.operator.maps[lift.map_name].is_read:
            # Nobody reads the space linearly: the least-squares solution of the chain rule.
            dual = torch.linalg.pinv(expand.double()).t().to(expand)
        elif param.feeds_head and self.operator.large.tied and self.operator.large.has_head:
            dual = expand
        else:
            dual = matrix(lift, Use.INPUT)
        if self.only_old:
            dual = dual * first_copy_mask(expand)[:, None]
        return self._entries(dual)

    def _within(self, lift: LiftedMap) -> LiftedMap:
        """The same for the features of a head that changes its size."""
        if lift.inner is None:
            return lift
        old = first_copy_mask(lift.inner)[:, None] if self.only_old else 1
        return replace(lift, inner=self._entries(lift.inner * old))

    def _gain(self, param: ParamSpec, layer: int | None, mixed: Tensor) -> Tensor:
        """n_i = gain_i x_i / |x|: with gain_i = f gain_s the gradient is what reads n_i, times what wrote x_i, over f
        (as the norm scales x by 1 / f_layers)."""
        operator = self.operator
        source, factor = operator.gain_names(param)
        source = operator.tensor(source)
        factor = operator.tensor(factor.replace(".final", ".layers")).double()
        lift = operator.space_maps.lift(param.axes[0])
        wrote = operator.matrix(layer)(lift, Use.OUTPUT).double()
        reads = self._matrix(param, lift, param.axes[0].use, layer)
        pick = torch.arange(len(source))
        share = reads.double()[pick, source] * self._entries(wrote[pick, source] / factor)
        return mixed[source] * share.to(mixed)

    def _entries(self, matrix: Tensor) -> Tensor:
        return matrix * matrix if self.squared else matrix

    def _with_new_rows(self, param: ParamSpec, grown: Tensor) -> Tensor:
        more = param.shape(self.operator.large)[0] - grown.shape[0]
        return torch.cat([grown, grown.new_zeros(more, *grown.shape[1:])]) if more else grown


def first_copy_mask(expand: Tensor) -> Tensor:
    """True for the large features that are the first to hold most of a small one. (large,), bool."""
    size = expand.abs()
    return ((size == size.max(dim=0).values).cumsum(dim=0).cumsum(dim=0) == 1).any(dim=1)
