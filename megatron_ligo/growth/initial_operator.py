"""The operator at the start of a fit, computed from its settings and their seed."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ligo.arch.spec import LAYER_PREFIX, Role
from megatron_ligo.common.recent_values import RecentValues
from megatron_ligo.growth import attention_heads, experts, initializers
from megatron_ligo.growth.operator import CACHE_BYTES, CACHE_SIZE, ROUTERS, Operator, depth_role, short_key
from megatron_ligo.growth.width_maps import HEAD_MAPS, LiftedMap, left_inverse, remove_visible


class InitialOperator(Operator):
    """Operator whose tensors are computed from the settings and their seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cached_tensors: RecentValues[Tensor] = RecentValues(CACHE_SIZE, CACHE_BYTES)

    def tensor(self, name: str) -> Tensor:
        tensor = self._cached_tensors.get(name)
        if tensor is None:
            exact = self.exact_tensor(name)
            tensor = exact.float() if exact.is_floating_point() else exact
            self._cached_tensors.put(name, tensor, tensor.nbytes)
        return tensor

    def exact_tensor(self, name: str) -> Tensor:
        """Returns a tensor of the operator in fp64, before rounding to fp32. Shapes: see operator.py."""
        kind, rest = name.split(".", 1)
        if kind == "depth":
            (param,) = (param for param in self.arch.layer_params(self.large) if short_key(param) == rest)
            initialise = initializers.DEPTH_INITS[self.setting("depth_init", rest)]
            return initialise(self.small.num_layers, self.large.num_layers, depth_role(param), self.generator(name))
        if kind == "gain":
            return self._initial_gain(rest)
        if kind == ROUTERS:
            generator = self.generator(f"router.{self.arch.get(Role.ROUTER).key.format(rest)}")
            return experts.draw_router(self.large, experts.num_shards(self.small, self.large), generator)
        map_name, side = rest.split(".")[0], rest.rsplit(".", 1)[1]
        expand = self._initial_expand(map_name, name)
        return expand if side == "expand" else self._initial_contract(map_name, name, expand)

    def initial_expand(self, map_name: str, layer: int | None = None) -> Tensor:
        """Returns the expand of a shared map, or of a layer's own map, (large, small), fp64."""
        return self._initial_expand(map_name, self.width_name(map_name, "expand", layer))

    def _initial_expand(self, map_name: str, name: str) -> Tensor:
        spec = self.maps[map_name]
        stem = name.rsplit(".", 1)[0]
        if map_name == "heads":
            # Query heads follow the keys and values of their group.
            groups = self._initial_expand("groups", stem.replace("heads", "groups"))
            return initializers.one_hot(attention_heads.query_head_sources(groups, self.small, self.large), spec.small)
        generator = self.generator(f"{stem}.expand")
        initialise = initializers.WIDTH_INITS[self.setting("width_init", map_name)]
        if map_name == "expert":
            shards = experts.num_shards(self.small, self.large)
            return experts.repeat_shards(initialise(spec.small, spec.large // shards, "", generator), shards)
        expand = initialise(spec.small, spec.large, self.norm_kind(map_name), generator)
        if self._keeps_mean_square(map_name):
            expand = expand / variance_ratio(expand) ** 0.5
        noise = self.setting("noise", map_name)
        if noise and self.setting("contract", map_name) == "tied" and spec.large > spec.small:
            new_rows = expand[spec.small :]
            scale = noise * new_rows.abs().mean()
            new_rows += scale * torch.randn(new_rows.shape, generator=generator, dtype=torch.float64)
        return expand

    def _keeps_mean_square(self, map_name: str) -> bool:
        """True if grown features have the small ones' mean square, so that eps stays, which norms of heads share.

        A tied contract reads with expand^T, which allows no factor.
        """
        has_head_norms = self.arch.normalises_queries(self.small)
        is_normalised = self.copied_gains and has_head_norms and self.norm_kind(map_name) == "rms"
        starts, contract = self.setting("width_init", map_name), self.setting("contract", map_name)
        return is_normalised and contract == "free" and starts in initializers.SCALED_COPIES

    def _initial_contract(self, map_name: str, name: str, expand: Tensor) -> Tensor:
        """Returns a left inverse of expand, (small, large), fp64. Noise preserves this: noise @ expand = 0."""
        contract = left_inverse(expand)
        # Where nothing grows, none is invisible, and a single entry has no spread.
        noise = self.setting("noise", map_name) if expand.shape[0] > expand.shape[1] else 0.0
        if noise and self.settings.noise_draw == "map":
            drawn = torch.randn(contract.shape, generator=self.generator(name), dtype=torch.float64)
            contract = contract + noise * contract.std() * remove_visible(drawn, expand, contract)
        return contract

    def _initial_gain(self, rest: str) -> Tensor:
        owner, _, kind = rest.rpartition(".")
        lift = self._gain_lift(owner)
        expand = self.initial_expand(lift.map_name)
        largest, source = expand.abs().max(dim=1)
        # Empty features have no source, and take the mean gain.
        source[largest == 0] = -1
        inner = torch.eye(lift.unit, dtype=torch.float64) if lift.inner is None else lift.inner
        factor_within, within = inner.max(dim=1)
        if kind == "source":
            first = source[:, None] * lift.unit + torch.arange(0, lift.unit, inner.shape[1])
            return (first.reshape(-1, 1) + within).flatten()
        if kind == "scale":
            return torch.ones(expand.shape[0], dtype=torch.float64)
        gain = torch.full((expand.shape[0],), variance_ratio(expand) ** 0.5, dtype=torch.float64)
        if lift.map_name in HEAD_MAPS:
            # Attention reads whole copies: no contract divides queries and keys among them.
            gain = torch.where(largest > 0, gain / largest, gain)
        if kind == "final" and self.large.tied and self.large.has_head:
            # A tied head reads with expand^T, which sums the copies of each feature.
            gain *= self.embedding_ratio
            gain /= torch.where(source < 0, 1.0, (expand * expand).sum(dim=0)[source.clamp(min=0)])
        heads = gain.repeat_interleave(lift.unit // inner.shape[1])
        return torch.outer(heads, factor_within).flatten()

    def _gain_lift(self, owner: str) -> LiftedMap:
        """Returns the lifted map of the gains that a layer's parameter or a space owns ("": the residual stream)."""
        param = self.arch.params_by_key.get(LAYER_PREFIX + owner)
        lift = LiftedMap(owner or "residual") if param is None else self.space_maps.lift(param.axes[0])
        assert lift is not None, f"the gain of {owner} has no map"
        return lift


def variance_ratio(expand: Tensor) -> float:
    """Returns the mean square of the grown residual stream over that of the small one: c D1 / D2.

    expand: (D2, D1). c: expand^T expand = c I, or the mean of its diagonal if it is not a multiple of I.
    """
    return float((expand * expand).sum() / expand.shape[0])
