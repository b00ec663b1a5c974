"""Growth of Adam's moments: gradients grow by the dual of the maps that grow the weights.

An output axis grows by the expand of its space, and its gradient by the contract. An input axis grows by the contract,
and its gradient by the expand:

    W_large = expand_out W contract_in          G_large = contract_out^T G expand_in^T

The first moment is a mean of gradients and grows as they do: exactly, if the grown model computes the small one's
function and copies have no noise. The second moment is a mean of squares and grows by the dual maps squared
elementwise: exactly, if their rows have one entry. For rows with several entries (dense or learned maps, noise) it is
an estimate that treats gradient entries as independent, and is too small if they are positively correlated.

Heads. If the copies of a KV group have different query heads, the group's gradient does not determine those of its
copies. It is divided evenly: an estimate. The moments of new features of k start at zero if the features rotate;
otherwise their gradients are known.

Experts. Copies that are chosen together share their expert's gradient equally; where a new router chooses among copies,
that is an estimate. So are the rows of a router for the shards of one expert, whose sum is known.

Layers. The output of new layers is zero, and their moments start at zero. So do those of new tokens, new positions and
the positions of a larger image, and of random experts and neurons and a new router. Several layers that copy one small
layer share its gradient (the least-squares solution of the chain rule), which leaves Adam's steps unchanged: an
estimate, as such a model computes a different function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Role, Use, expert_index, key_pattern, layer_index
from megatron_ligo.growth import experts
from megatron_ligo.growth.linear_maps import cheapest_form
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.growth.width_maps import LiftedMap, apply_map

SQUARE = "exp_avg_sq"
# Policies. GROW grows all moments. OLD zeroes those of second and later copies of a feature.
GROW, OLD = "grow", "old"


def find_new_layers(operator: Operator) -> list[int]:
    """Returns the large layers that add nothing to the residual stream."""
    weights = [
        operator.tensor(f"depth.{short_key(param)}")
        for param in operator.arch.layer_params(operator.large)
        if param.writes_residual and not param.is_bias
    ]
    is_idle = torch.stack([(weight == 0).all(dim=1) for weight in weights]).all(dim=0)
    return is_idle.nonzero().flatten().tolist()


def find_estimated_maps(operator: Operator) -> list[str]:
    """Returns the names of the maps whose grown moments are estimates.

    Width maps: some row of expand, or column of contract, has several entries. Depth maps: a layer with nonzero output
    mixes several small layers, or several such layers copy one.
    """
    names = []
    new_layers = find_new_layers(operator)
    for name in operator.shapes():
        if name.startswith("width"):
            entries = operator.tensor(name)
            rows = entries if name.endswith("expand") else entries.t()
            if bool(((rows != 0).sum(dim=1) > 1).any()):
                names.append(name)
        elif name.startswith("depth"):
            copies = operator.tensor(name) != 0
            copies[new_layers] = False
            if any(bool((copies.sum(dim=dim) > 1).any()) for dim in (0, 1)):
                names.append(name)
    return names


def splits_kv_groups(operator: Operator) -> bool:
    """True if the moments of k and v are estimates: the query heads of a KV group are divided among its copies."""
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


def copies_normalised_queries(operator: Operator) -> bool:
    """True if the moments of q are estimates: the features of a head are copied, and normalised with their copies."""
    return operator.space_maps.head_dim_changed and operator.arch.normalises_queries(operator.small)


class DualMaps:
    """Dual maps of an operator for one of the two moments. For the second they are squared elementwise."""

    def __init__(self, operator: Operator, kind: str, policy: str):
        """kind: exp_avg or exp_avg_sq; policy: GROW or OLD."""
        self.operator = operator
        self.is_squared = kind == SQUARE
        self.keeps_first_copies_only = policy == OLD
        self.new_layers = find_new_layers(operator)

    def grow(self, key: str, read: Callable[[str], Tensor]) -> Tensor:
        """Returns a large key's moment, in the large weight's shape, in fp32 or wider.

        read(key): a small key's moment, in the small weight's shape.
        """
        operator, param, layer = self.operator, self.operator.arch.param(key), layer_index(key)
        if experts.is_new(param.role, operator.small, operator.settings):
            return torch.zeros(param.shape(operator.large))
        if param.axes[0].space == "position" and operator.large.image_size != operator.small.image_size:
            return torch.zeros(param.shape(operator.large))
        grown = self._mix_layers(param, key, layer, self._mix_experts(param, key, layer, read))
        shard = experts.shard_rows(key, operator.small, operator.large)
        if operator.copies_gain(param):
            return self._grow_gain(param, layer, grown)
        inner = operator.space_maps.inner_gain_map(param, dual=True)
        if inner is not None:
            return self._square_if_needed(inner).to(grown) @ grown
        for dim, axis in enumerate(param.axes):
            lift = operator.space_maps.lift(axis, dual=True)
            if lift is not None:
                matrix = self._dual_matrix(param, lift, axis.use, layer).to(grown)
                is_cut = shard is not None and lift.map_name == "ffn"
                dual = cheapest_form(matrix[shard] if is_cut else matrix)
                grown = apply_map(grown, dim, dual, self._with_dual_inner(lift))
        if param.in_expert and operator.settings.expert_drop:
            chosen = operator.dropped_neurons(key)
            grown = experts.drop_neurons(grown, torch.zeros_like(grown), param, chosen)
        if operator.settings.borrow == "next" and param.in_layer:
            # New features take their rows from another layer.
            grown[param.shape(operator.small)[0] :] = 0
        if param.role is Role.WORD_EMBEDDING:
            ratio = operator.embedding_ratio
            grown = grown * (ratio**2 if self.is_squared else ratio)
        num_added = param.shape(operator.large)[0] - grown.shape[0]
        return torch.cat([grown, grown.new_zeros(num_added, *grown.shape[1:])]) if num_added else grown

    def _mix_layers(self, param: ParamSpec, key: str, layer: int | None, read: Callable[[str], Tensor]) -> Tensor:
        if layer is None:
            moment = read(key)
            return moment.to(torch.promote_types(moment.dtype, torch.float32))
        weights = self._dual_depth(param)[layer]
        if param.skips_first_layer:
            weights[0] = 0
        sources = weights.nonzero().flatten().tolist()
        first = read(key_pattern(key).format(sources[0] if sources else int(param.skips_first_layer), 0))
        mixed = torch.zeros_like(first, dtype=torch.promote_types(first.dtype, torch.float32))
        for i in sources:
            mixed.add_(read(key_pattern(key).format(i, 0)).to(mixed), alpha=float(weights[i]))
        return mixed

    def _mix_experts(
        self, param: ParamSpec, key: str, layer: int | None, read: Callable[[str], Tensor]
    ) -> Callable[[str], Tensor]:
        """Returns a function that reads a small key of any expert as an expert's share of the small experts' moments.

        Copies of an expert see an equal share of its tokens' gradients: exactly, if all of them are chosen together.
        The shards of one see all of a copy's, and `down`, which is as many times the small one's, that part of it.
        """
        expert = expert_index(key)
        if expert is None:
            return read
        expand = self.operator.matrix(layer)(LiftedMap("expert"), Use.OUTPUT).double()
        shares = torch.linalg.pinv(expand).t()[expert]
        shares[shares.abs() < 1e-9] = 0
        if not param.writes_residual:
            shares = shares * experts.num_shards(self.operator.small, self.operator.large)
        return experts.read_mixture(self._square_if_needed(shares), read)

    def _dual_depth(self, param: ParamSpec) -> Tensor:
        """Returns the dual of a depth map, (large layers, small layers), fp64."""
        weights = self.operator.tensor(f"depth.{short_key(param)}").double()
        is_old = torch.ones(len(weights), dtype=torch.bool)
        is_old[self.new_layers] = False
        dual = torch.zeros_like(weights)
        dual[is_old] = torch.linalg.pinv(weights[is_old]).t()
        # pinv returns tiny numbers for exact zeros.
        dual[dual.abs() < 1e-9] = 0
        return self._square_if_needed(dual)

    def _dual_matrix(self, param: ParamSpec, lift: LiftedMap, use: Use, layer: int | None) -> Tensor:
        """Returns the dual of an axis's map, (large, small)."""
        matrix = self.operator.matrix(layer)
        expand = matrix(lift, Use.OUTPUT)
        if use is Use.INPUT:
            dual = expand
        elif not self.operator.maps[lift.map_name].is_read:
            # No linear reads the space: the least-squares solution of the chain rule.
            dual = torch.linalg.pinv(expand.double()).t().to(expand)
        elif param.feeds_head and self.operator.large.tied and self.operator.large.has_head:
            dual = expand
        else:
            dual = matrix(lift, Use.INPUT)
        if self.keeps_first_copies_only:
            dual = dual * first_copy_mask(expand)[:, None]
        return self._square_if_needed(dual)

    def _with_dual_inner(self, lift: LiftedMap) -> LiftedMap:
        """Applies the policy and the square to the map of the features within each head."""
        if lift.inner is None:
            return lift
        mask = first_copy_mask(lift.inner)[:, None] if self.keeps_first_copies_only else 1
        return replace(lift, inner=self._square_if_needed(lift.inner * mask))

    def _grow_gain(self, param: ParamSpec, layer: int | None, mixed: Tensor) -> Tensor:
        """Grows the moment of a norm's gain: (small,) -> (large,).

        With n_i = gain_i x_i / |x|, the gradient of gain_i is that of gain_s times reads[i, s] writes[i, s] / f_layers:
        the dual of n_i, the growth of x_i, and the growth of |x|. The f of a
        norm over all heads is divided by writes, the factor of the values which the head weighs.
        """
        operator = self.operator
        source_name, factor_name = operator.gain_names(param)
        # A new feature's gain, with the mean gain for a source, starts without moments.
        source, is_new = operator.tensor(source_name).clamp(min=0), operator.tensor(source_name) < 0
        factor = operator.tensor(factor_name.replace(".final", ".layers")).double()
        lift = operator.space_maps.lift(param.axes[0])
        writes = operator.matrix(layer)(lift, Use.OUTPUT).double()
        reads = self._dual_matrix(param, lift, param.axes[0].use, layer).double()
        rows = torch.arange(len(source) // lift.unit)
        entries = rows, source[:: lift.unit] // lift.unit
        grown = writes[entries] / factor[:: lift.unit]
        if param.feeds_head and operator.large.tied:
            grown = grown / operator.embedding_ratio
        share = reads[entries] * self._square_if_needed(grown)
        share = share.repeat_interleave(lift.unit).masked_fill(is_new, 0)
        return mixed[source] * share.to(mixed)

    def _square_if_needed(self, matrix: Tensor) -> Tensor:
        return matrix * matrix if self.is_squared else matrix


def first_copy_mask(expand: Tensor) -> Tensor:
    """Marks the first large feature with the largest entry of each small one: (large, small) -> (large,), bool."""
    size = expand.abs()
    return ((size == size.max(dim=0).values).cumsum(dim=0).cumsum(dim=0) == 1).any(dim=1)
