"""The linears and norms of a Megatron-core layer, run on factors.

A column-parallel linear is `y = ((x C^T) [B W]^T)`, a row-parallel one `y = reduce(x [W A]^T) E^T`, with C, E the
residual contract and expand (whole on every rank), B, A this rank's part of the head and ffn maps, W the mixed
small weight. Communication happens in the small space. [B W] is either built (once a step, shared by all
micro-batches) or applied factor by factor, whichever costs fewer FLOPs.

A linear takes the norm or the activation before it along: then no result of these is kept for the backward pass, which
computes them again, for no product is needed for that (`made_again`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ligo.arch.spec import Pack, ParamSpec, Use
from megatron_ligo.growth.fit_flops import factors_are_cheaper
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.growth.width_maps import apply_map
from megatron_ligo.models.factored.context import FactoredContext, with_lag
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.mcore.norm import normalise
from megatron_ligo.sharding.tensor_parallel import pack


class FactoredModule(nn.Module):
    """A place in a Megatron-core layer: holds no parameters, is given its tensors before each forward."""

    def __init__(self, *_, **__):
        super().__init__()
        self.run: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor):
        assert self.run is not None, "a grown module runs inside its layer only"
        return self.run(x)


class FactoredLinear(FactoredModule):
    def forward(self, x: Tensor):
        return super().forward(x), None


class FactoredSubmodule(ABC):
    """One module of a Megatron-core layer and the rows that it stands for. count: of the tensors that it built."""

    count = 0
    before: Callable[[Tensor], Tensor] | None = None  # what a linear does to its input first

    def __init__(self, module: FactoredModule, rows: list[ParamSpec], layer: int, runtime: FactoredContext, config):
        self.module = module
        self.fresh = {row.key: runtime.fresh_rows(row, layer) for row in rows}
        self.added = {row.key: runtime.added(row, layer) for row in rows}
        self.weights = [row for row in rows if len(row.axes) == 2]
        self.vectors = [row for row in rows if len(row.axes) == 1]
        self.runtime = runtime
        self.config = config

    @abstractmethod
    def build(self, mixed: dict[str, Tensor], maps: dict[str, LinearMap]) -> list[Tensor]:
        """Once a step: what its forward passes multiply with. mixed: the small weights of this layer, by row."""

    @abstractmethod
    def bound(self, built: list[Tensor], maps: dict[str, LinearMap]) -> Callable[[Tensor], Tensor]:
        """The module's forward pass, on what was built."""

    def release(self) -> None:
        """Lets go of what was bound: the graph of a forward pass hangs on it."""
        self.module.run = None

    def _read(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The first product of a linear, of its input x after what comes before."""
        before = self.before
        # Where whole layers are computed again, doing so twice takes more memory, not less.
        if self.runtime.recompute or (before is None and x.is_contiguous()):
            return product(x if before is None else before(x))
        return checkpointed(product if before is None else lambda x: product(before(x)), x)

    def _read_whole(self, x: Tensor) -> Tensor:
        """The input itself, after what comes before: what the lag's training has added is as large as the model."""
        return self._read(passed_on, x)


class ColumnParallelFactors(FactoredSubmodule):
    """Reads the residual stream: q, k, v; gate, up."""

    def __init__(self, module: FactoredModule, rows: list[ParamSpec], layer: int, runtime: FactoredContext, config):
        super().__init__(module, rows, layer, runtime, config)
        self.pack = self.weights[0].slots["mcore"].pack
        self.groups = runtime.operator.large.num_kv_heads // runtime.mesh.tp
        parts = [self.added.pop(row.key) for row in self.weights]
        self.more = None if runtime.lag is None else pack(parts, self.pack, self.groups)

    def build(self, mixed, maps):
        self.factored = [False] * len(self.weights)
        if self.pack is not Pack.GROUPED:
            self.factored = [self._factored(row, mixed, maps) for row in self.weights]
        built = [
            mixed[row.key] if f else self._rows(row, mixed, maps)
            for row, f in zip(self.weights, self.factored, strict=True)
        ]
        if not any(self.factored):
            built = [pack(built, self.pack, self.groups)]
        if self.vectors:
            grown = [with_lag(self._rows(row, mixed, maps), self.added[row.key]) for row in self.vectors]
            built.append(pack(grown, self.pack, self.groups))
        return built

    def _rows(self, row: ParamSpec, mixed, maps) -> Tensor:
        matrix, lift = self.runtime.map_for(maps, row, 0)
        grown = apply_map(mixed[row.key], 0, matrix, lift)
        fresh = self.fresh[row.key]
        return grown if fresh is None else grown + fresh.to(grown)

    def _factored(self, row: ParamSpec, mixed, maps) -> bool:
        matrix, _ = self.runtime.map_for(maps, row, 0)
        return self.fresh[row.key] is None and factors_are_cheaper(
            self.runtime.tokens_per_step, matrix.shape, mixed[row.key].shape[1], matrix.cost
        )

    def bound(self, built, maps):
        contract = map_for_use(maps, "residual", True)
        bias = built[-1] if self.vectors else None

        def run(x: Tensor) -> Tensor:
            u = self.runtime.enter_tp_region(self._read(contract.apply_transposed, x))
            if not any(self.factored):
                y = F.linear(u, built[0])
            else:
                y = torch.cat(
                    [
                        self._one(u, row, weight, f, maps)
                        for row, weight, f in zip(self.weights, built, self.factored, strict=False)
                    ],
                    dim=-1,
                )
            if self.more is not None:
                y = y + F.linear(self.runtime.enter_tp_region(self._read_whole(x)), self.more.to(y.dtype))
            return y if bias is None else y + bias

        return run

    def _one(self, u: Tensor, row: ParamSpec, weight: Tensor, factored: bool, maps) -> Tensor:
        y = F.linear(u, weight)
        return self.runtime.map_for(maps, row, 0)[0].apply(y) if factored else y


class RowParallelFactors(FactoredSubmodule):
    """Writes the residual stream: o, down."""

    def build(self, mixed, maps):
        (row,) = self.weights
        matrix, lift = self.runtime.map_for(maps, row, 1)
        weight = mixed[row.key]
        tokens = self.runtime.tokens_per_step
        self.factored = lift.plain and factors_are_cheaper(tokens, matrix.shape, weight.shape[0], matrix.cost)
        built = [weight if self.factored else apply_map(weight, 1, matrix, lift)]
        return built + [mixed[row.key].to(weight.dtype) for row in self.vectors]

    def bound(self, built, maps):
        (row,) = self.weights
        expand = map_for_use(maps, "residual", False)
        inner = self.runtime.map_for(maps, row, 1)[0] if self.factored else None
        multiply = (lambda x: F.linear(x, built[0])) if inner is None else inner.apply_transposed
        more, bias = self.added[row.key], self.added[self.vectors[0].key] if self.vectors else None

        def run(x: Tensor) -> Tensor:
            y = self._read(multiply, x)
            z = self.runtime.leave_tp_region(y if inner is None else F.linear(y, built[0]))
            grown = expand.apply(z if len(built) == 1 else z + built[1])
            return grown if more is None else with_lag(grown + self._more(x, more), bias)

        return run

    def _more(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.runtime.leave_tp_region(F.linear(self._read_whole(x), weight.to(x.dtype)))


class FactoredNorm(FactoredSubmodule):
    """Scales the residual stream: the norms' gains and biases. reader: the linear that does it, if one place does."""

    reader: FactoredSubmodule | None = None

    def build(self, mixed, maps):
        built = []
        expand = map_for_use(maps, "residual", False)
        for row in self.vectors:
            grow = self.runtime.grow_gain if row.axes[0].use is Use.GAIN else self.runtime.grow_shift
            built.append(with_lag(grow(row, mixed[row.key], expand), self.added[row.key]))
        return [tensor.to(self.runtime.dtype) for tensor in built]

    def bound(self, built, maps):
        bias = built[1] if len(built) > 1 else None
        config = self.config

        def run(x: Tensor) -> Tensor:
            return normalise(x, built[0], bias, config.layernorm_epsilon, config.normalization)

        if self.reader is None:
            return run
        self.reader.before = run
        return lambda x: x

    def release(self):
        super().release()
        if self.reader is not None:
            self.reader.before = None


def passed_on(x: Tensor) -> Tensor:
    return x


def checkpointed(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), keeping x alone: the backward pass computes again what comes before run's last product."""
    if not torch.is_grad_enabled():
        return run(x)
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=False)


def place_kind(rows: list[ParamSpec]) -> type[FactoredSubmodule]:
    if any(row.axes[0].use is Use.GAIN for row in rows):
        return FactoredNorm
    return ColumnParallelFactors if rows[0].split == 0 else RowParallelFactors
