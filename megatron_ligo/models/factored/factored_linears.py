"""The linears and norms of a Megatron-core layer, computed from factors.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model; n features of an inner space (heads or
ffn) on one TP rank.

A column-parallel linear is `y = ((x C^T) [B W]^T)`, a row-parallel one `y = reduce(x [W A]^T) E^T`, with C, E the
residual contract and expand (replicated), B, A this rank's part of the head and ffn maps, W the mixed
small weight. Communication happens in the small space. [B W] is either built (once per step, shared by all
micro-batches) or applied factor by factor, whichever costs fewer FLOPs (models/factored/fit_flops.py).

A linear applies the norm or activation before it as its input transform. Only the linear's input is saved: the backward
pass recomputes the transform, which needs no matrix product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ligo.arch.spec import Heads, ParamSpec, Use, axis_size
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.growth.width_maps import apply_map
from megatron_ligo.models.factored.context import FactoredContext, add_lag
from megatron_ligo.models.factored.fit_flops import is_factored
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.mcore.norm import normalise, normalise_all_heads
from megatron_ligo.sharding.fused_tensors import pack

Maps = dict[str, LinearMap]  # by side
PointwiseFunction = Callable[[Tensor], Tensor]  # (s, b, any) -> (s, b, any), token by token


class InputTransform(ABC):
    """A norm or activation that a linear applies to its input, (s, b, n) -> (s, b, m)."""

    def build(self, mixed: dict[str, Tensor], maps: Maps, dtype: torch.dtype) -> list[Tensor]:
        """Builds the transform's tensors, once per step."""
        return []

    @abstractmethod
    def bind(self, tensors: list[Tensor]) -> PointwiseFunction:
        """Returns the transform as a function with the tensors of `build` bound."""


class ActivationTransform(InputTransform):
    """The activation of the MLP, (s, b, fused) -> (s, b, ffn)."""

    def __init__(self, function: PointwiseFunction):
        self.function = function

    def bind(self, tensors: list[Tensor]) -> PointwiseFunction:
        return self.function


class NormTransform(InputTransform):
    """A norm of the residual stream, (s, b, D2) -> (s, b, D2), or of heads, (s, b, heads / tp, d) -> the same shape.

    Its tensors are the gain and the bias, if any.
    """

    def __init__(self, context: FactoredContext, specs: list[ParamSpec], layer: int, eps: float, kind: str):
        self.context = context
        self.specs = specs
        self.lag = {spec.key: context.lag_shard(spec, layer) for spec in specs}
        self.eps, self.kind = eps, kind

    def build(self, mixed, maps, dtype):
        tensors = []
        for spec in self.specs:
            grow = self.context.grow_gain if spec.axes[0].use is Use.GAIN else self.context.grow_norm_bias
            grown = self.context.enter_partial_use(spec, grow(spec, mixed[spec.key], maps))
            tensors.append(add_lag(grown, self.lag[spec.key]))
        return [tensor.to(dtype) for tensor in tensors]

    def bind(self, tensors):
        axis = self.specs[0].axes[0]
        if axis.heads is not Heads.NONE:
            num_heads = axis_size(axis, self.context.operator.large) // self.context.operator.large.head_dim
            group = self.context.mesh.tp_group
            return partial(normalise_all_heads, weight=tensors[0], eps=self.eps, num_heads=num_heads, group=group)
        bias = tensors[1] if len(tensors) > 1 else None
        return partial(normalise, weight=tensors[0], bias=bias, eps=self.eps, kind=self.kind)


class ModulePlaceholder(nn.Module):
    """Placeholder for a Megatron-core module that a factored one replaces. Returns x (...) unchanged."""

    def __init__(self, *_, **__):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class FactoredModule(nn.Module, ABC):
    """A module of a Megatron-core layer that is computed from factors. It has no parameters.

    `build` makes its tensors once per step, of one layer or of several, stacked along a first dim. `bind` sets those of
    one layer for the forward pass of one micro-batch, and `unbind` releases them, as they keep the graph of that pass
    alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operands: tuple[list[Tensor], Maps] | None = None

    @abstractmethod
    def build(self, mixed: dict[str, Tensor], maps: Maps, dtype: torch.dtype) -> list[Tensor]:
        """Builds the tensors of a step's forward passes. mixed: the layer's mixed small weights (small shapes)."""

    def adopt_build(self, other: FactoredModule) -> None:
        """Takes over what `build` of another layer's module has noted, for its tensors are this module's too."""
        return

    def bind(self, tensors: list[Tensor], maps: Maps) -> None:
        """Sets the tensors for the next forward pass, in the shapes of `build`."""
        self._operands = tensors, maps

    def unbind(self) -> None:
        self._operands = None

    def operands(self) -> tuple[list[Tensor], Maps]:
        """Returns the bound tensors, in the shapes of `build`, and the layer's maps."""
        assert self._operands is not None, "a factored module runs inside its layer only"
        return self._operands


class FactoredNorm(FactoredModule):
    """A norm that no linear reads: after a residual sum or a block, (s, b, D2) -> (s, b, D2), or of heads."""

    def __init__(self, transform: NormTransform):
        super().__init__()
        self.transform = transform

    def build(self, mixed, maps, dtype):
        return self.transform.build(mixed, maps, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tensors, _ = self.operands()
        return self.transform.bind(tensors)(x)


class FactoredScale(FactoredModule):
    """A learned scale of what a block returns, (s or s / tp, b, D2) -> the same shape."""

    def __init__(self, context: FactoredContext, specs: list[ParamSpec], layer: int):
        super().__init__()
        self.context = context
        (self.spec,) = specs
        self.lag = context.lag_shard(self.spec, layer)

    def build(self, mixed, maps, dtype):
        grown = self.context.grow_gain(self.spec, mixed[self.spec.key], maps)
        return [add_lag(self.context.enter_partial_use(self.spec, grown), self.lag).to(dtype)]

    def forward(self, x: Tensor) -> Tensor:
        (scale,), _ = self.operands()
        return x * scale


class FactoredLinear(FactoredModule):
    """A linear whose weight is grown, with its input transform. Returns (y, None), as Megatron-core's linears do."""

    def __init__(
        self, context: FactoredContext, specs: list[ParamSpec], layer: int, input_transform: InputTransform | None
    ):
        super().__init__()
        self.context = context
        self.input_transform = input_transform
        self.fresh = {spec.key: context.fresh_rows(spec, layer) for spec in specs}
        self.lag = {spec.key: context.lag_shard(spec, layer) for spec in specs}
        self.weights = [spec for spec in specs if len(spec.axes) == 2]
        self.biases = [spec for spec in specs if len(spec.axes) == 1]
        self.num_transform_tensors = 0
        # Whether each weight, or the only one, is applied as factors.
        self.factored: list[bool] = []

    def build(self, mixed, maps, dtype):
        before = [] if self.input_transform is None else self.input_transform.build(mixed, maps, dtype)
        self.num_transform_tensors = len(before)
        return before + self.build_products(mixed, maps)

    def adopt_build(self, other):
        self.num_transform_tensors, self.factored = other.num_transform_tensors, other.factored

    @abstractmethod
    def build_products(self, mixed: dict[str, Tensor], maps: Maps) -> list[Tensor]:
        """Builds the linear's own tensors."""

    @abstractmethod
    def multiply(self, x: Tensor, transform: PointwiseFunction | None, tensors: list[Tensor], maps: Maps) -> Tensor:
        """Returns the linear applied to transform(x)."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        tensors, maps = self.operands()
        count = self.num_transform_tensors
        transform = None if self.input_transform is None else self.input_transform.bind(tensors[:count])
        return self.multiply(x, transform, tensors[count:], maps), None

    def apply_to_input(self, function: PointwiseFunction, x: Tensor, transform: PointwiseFunction | None) -> Tensor:
        """Returns function(transform(x)), saving only x for the backward pass."""
        # If the whole layer is recomputed, nested recomputation takes more memory, not less.
        if self.context.recompute or (transform is None and x.is_contiguous()):
            return function(x if transform is None else transform(x))
        return recompute_all_but_last(function if transform is None else lambda x: function(transform(x)), x)


class ColumnParallelFactors(FactoredLinear):
    """Linear from the residual stream, (s or s / tp, b, D2) -> (s, b, n), fused: q, k, v; gate, up."""

    def __init__(self, context, specs, layer, input_transform):
        super().__init__(context, specs, layer, input_transform)
        self.pack = self.weights[0].locations["mcore"].pack
        self.groups = context.operator.large.num_kv_heads // context.mesh.tp
        lags = [self.lag.pop(spec.key) for spec in self.weights]
        self.fused_lag = None if context.lag is None else pack(lags, self.pack, self.groups)

    def build_products(self, mixed, maps):
        self.factored = [self._is_factored(spec, mixed, maps) for spec in self.weights]
        tensors = [
            mixed[spec.key] if factored else self._grow_rows(spec, mixed, maps)
            for spec, factored in zip(self.weights, self.factored, strict=True)
        ]
        if not any(self.factored):
            tensors = [self._pack(tensors, -2)]
        if self.biases:
            biases = [add_lag(self._grow_rows(spec, mixed, maps), self.lag[spec.key]) for spec in self.biases]
            tensors.append(self._pack(biases, -1))
        return tensors

    def _pack(self, tensors: list[Tensor], dim: int) -> Tensor:
        return pack([tensor.movedim(dim, 0) for tensor in tensors], self.pack, self.groups).movedim(0, dim)

    def _grow_rows(self, spec: ParamSpec, mixed: dict[str, Tensor], maps: Maps) -> Tensor:
        """Returns a weight (..., n, D1) or a bias (..., n) of this rank."""
        matrix, lift = self.context.map_for(maps, spec, 0)
        tensor = mixed[spec.key]
        grown = apply_map(tensor, tensor.dim() - len(spec.axes), matrix, lift)
        fresh = self.fresh[spec.key]
        return grown if fresh is None else grown + fresh.to(grown)

    def _is_factored(self, spec: ParamSpec, mixed: dict[str, Tensor], maps: Maps) -> bool:
        matrix, lift = self.context.map_for(maps, spec, 0)
        other, has_random_rows = mixed[spec.key].shape[-1], self.fresh[spec.key] is not None
        return is_factored(
            spec, lift, self.context.tokens_per_step, matrix.shape, other, matrix.cost, has_random_rows=has_random_rows
        )

    def multiply(self, x, transform, tensors, maps):
        contract = map_for_use(maps, "residual", True)
        u = self.context.enter_tp_region(self.apply_to_input(contract.apply_transposed, x, transform))
        if any(self.factored):
            parts = zip(self.weights, tensors, self.factored, strict=False)
            y = torch.cat(
                [self._multiply_one(u, spec, tensor, factored, maps) for spec, tensor, factored in parts], dim=-1
            )
        else:
            y = F.linear(u, tensors[0])
        if self.fused_lag is not None:
            # The lag has the large weight's shape, so the large input enters the TP region.
            whole = self.context.enter_tp_region(self.apply_to_input(pass_through, x, transform))
            y = y + F.linear(whole, self.fused_lag.to(y.dtype))
        return y + tensors[-1] if self.biases else y

    def _multiply_one(self, u: Tensor, spec: ParamSpec, tensor: Tensor, factored: bool, maps: Maps) -> Tensor:
        y = F.linear(u, tensor)
        return self.context.map_for(maps, spec, 0)[0].apply(y) if factored else y


class RowParallelFactors(FactoredLinear):
    """Linear into the residual stream, (s, b, n) -> (s or s / tp, b, D2): o; down."""

    def build_products(self, mixed, maps):
        (spec,) = self.weights
        matrix, lift = self.context.map_for(maps, spec, 1)
        weight, fresh = mixed[spec.key], self.fresh[spec.key]
        if fresh is not None:
            # The rows of the new residual features follow those of the small ones.
            weight = torch.cat([weight, fresh.to(weight)])
        tokens = self.context.tokens_per_step
        self.factored = [is_factored(spec, lift, tokens, matrix.shape, weight.shape[-2], matrix.cost)]
        tensors = [weight if self.factored[0] else apply_map(weight, weight.dim() - 1, matrix, lift)]
        return tensors + [mixed[spec.key].to(weight.dtype) for spec in self.biases]

    def multiply(self, x, transform, tensors, maps):
        (spec,) = self.weights
        if self.factored[0]:
            y = self.apply_to_input(self.context.map_for(maps, spec, 1)[0].apply_transposed, x, transform)
            y = F.linear(y, tensors[0])
        else:
            y = self.apply_to_input(lambda x: F.linear(x, tensors[0]), x, transform)
        z, new = self._split_new(self.context.leave_tp_region(y))
        grown = map_for_use(maps, "residual", False).apply(z if len(tensors) == 1 else z + tensors[1])
        grown = grown if new is None else add_new_features(grown, new)
        lag = self.lag[spec.key]
        if lag is None:
            return grown
        added = F.linear(self.apply_to_input(pass_through, x, transform), lag.to(x.dtype))
        bias_lag = self.lag[self.biases[0].key] if self.biases else None
        return add_lag(grown + self.context.leave_tp_region(added), bias_lag)

    def _split_new(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits z (s, b, D1 + new) into the small features and the new ones, which no map grows."""
        fresh = self.fresh[self.weights[0].key]
        if fresh is None:
            return z, None
        return z.split([z.shape[-1] - len(fresh), len(fresh)], dim=-1)


def add_new_features(h: Tensor, new: Tensor) -> Tensor:
    """Adds values of the last features, (..., D2 - D1), to h (..., D2)."""
    return h + F.pad(new, (h.shape[-1] - new.shape[-1], 0))


def pass_through(x: Tensor) -> Tensor:
    """Returns x (any shape) unchanged."""
    return x


def recompute_all_but_last(function: PointwiseFunction, x: Tensor) -> Tensor:
    """Returns function(x), saving only x (s, b, any). The backward pass recomputes all before the last product."""
    if not torch.is_grad_enabled():
        return function(x)
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
