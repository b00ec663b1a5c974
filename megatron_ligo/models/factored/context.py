"""What the grown modules of a process share: sizes, source, precision, and what is built once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_ligo.arch.spec import ParamSpec, Use
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth import random_init
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.width_maps import LiftedMap
from megatron_ligo.models.factored.map_parameters import MapParameters, map_for_use
from megatron_ligo.models.factored.small_weights import SmallWeights
from megatron_ligo.models.factored.teacher import Teacher
from megatron_ligo.models.mcore.layer_spec import normalization, rotary_embedding
from megatron_ligo.models.mcore.norm import normalise
from megatron_ligo.sharding.tensor_parallel import shard

MIXED_AT_ONCE = 8  # layers, enough for the products of a pass over the source to weigh more than the pass


@dataclass
class FactoredContext:
    """What all grown modules of a process share, and what changes from call to call.

    micro_batches: how many of them share what is built once a step. It must be 1 under ZeRO 3: where a parameter's
    first gradient of a step comes late, DeepSpeed 0.19.8 adds it to the step before's.

    gradients_each: each micro-batch gives some parameters their gradients, for ZeRO 2 fails where one gives none.

    lag: by canonical key, what some training of the large model has added to its start (training/lag.py). Each weight
    is grown(maps) + lag then, and lag is frozen.
    """

    operator: Operator
    source: SmallWeights
    mesh: Mesh
    dtype: torch.dtype
    micro_batches: int = 1
    tokens_per_step: int = 1
    recompute: bool = False
    sequence_parallel: bool = False
    gradients_each: bool = False
    teacher: Teacher | None = None
    lag: Callable[[str], Tensor] | None = None
    generation: int = 0  # counts optimizer steps: what was built from the maps is stale when it moves
    shared: list[Tensor] = field(default_factory=list)  # the shared maps as this micro-batch sees them
    shared_once: dict[str, LinearMap] = field(default_factory=dict)  # as what is built in a step's first one sees them
    depths: dict[int, Callable[[], tuple[Tensor, Tensor]]] = field(default_factory=dict)  # of this process's layers
    mixed: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # what layers have not yet taken

    def __post_init__(self) -> None:
        self.shared_maps: MapParameters | None = None
        self.rotary = rotary_embedding(self.operator.large)
        names = [name for name in self.operator.shapes() if name.startswith("gain.")]
        self.gain = {name: self.operator.tensor(name).to(device.current_device()) for name in names}
        self.added_outside = self._added_outside()

    def positions(self, h: Tensor) -> Tensor | None:
        """The rotary positions of the whole sequences of which h (s, b, hidden) has this rank's tokens."""
        return (
            None if self.rotary is None else self.rotary(h.shape[0] * (self.mesh.tp if self.sequence_parallel else 1))
        )

    def with_positions(self, h: Tensor, outside: Mapping[str, Tensor]) -> Tensor:
        """h (s, b, features), this rank's tokens, with the rows of their positions and of the first segment added,
        where those are learned. outside: the tables, of so many features."""
        table, segments = (outside.get(key) for key in ("positions", "token_types"))
        if table is None:
            return h
        first = self.operator.small.first_position
        first += self.mesh.tp_rank * h.shape[0] if self.sequence_parallel else 0
        h = h + table[first : first + h.shape[0], None]
        return h if segments is None else h + segments[0]

    def added(self, row: ParamSpec, layer: int | None = None) -> Tensor | None:
        """This rank's part of what the lag's training has added to a row, in the fit's dtype; None without a lag."""
        if self.lag is None:
            return None
        tensor = self.lag(row.key if layer is None else row.key.format(layer))
        return shard(tensor, row, self.mesh.tp, self.mesh.tp_rank).clone().to(device.current_device(), self.dtype)

    def _added_outside(self) -> dict[str, Tensor]:
        """The same of the rows outside the layers that this stage has; a tied head's is the embedding's."""
        if self.lag is None:
            return {}
        arch, tied = self.operator.arch, self.operator.large.tied
        found: dict[str, Tensor] = {}
        for key in self.source.outside:
            shared = tied and key == "head" and "embed" in found
            found[key] = found["embed"] if shared else self.added(arch.row("embed" if tied and key == "head" else key))
        return found

    def outside_norm(self, key: str, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """h (s, b, large) through the grown norm outside the layers whose gain is the row of that key."""
        arch, large = self.operator.arch, self.operator.large
        gain, bias = arch.row(key), arch.by_key.get(f"{key}_bias")
        expand = map_for_use(maps, arch.space(gain.axes[0], large), False)
        weight = with_lag(self.grow_gain(gain, self.source.outside[key], expand), self.added_outside.get(key))
        shift = None
        if bias is not None:
            grown = self.grow_shift(bias, self.source.outside[bias.key], expand)
            shift = with_lag(grown, self.added_outside.get(bias.key)).to(h.dtype)
        return normalise(h, weight.to(h.dtype), shift, large.norm_eps, normalization(large))

    def enter_tp_region(self, u: Tensor) -> Tensor:
        """u (s, b, small), which every tensor-parallel rank reads for its own rows: whole sequences, partial uses."""
        enter = gather_sequence if self.sequence_parallel else copy_to
        return enter(u, self.mesh.tp_group)

    def leave_tp_region(self, z: Tensor) -> Tensor:
        """The sum of what the tensor-parallel ranks write to (s, b, small); this rank's tokens of it."""
        leave = scatter_sequence if self.sequence_parallel else reduce_from
        return leave(z, self.mesh.tp_group)

    def matrices(self) -> dict[str, LinearMap]:
        """The shared maps for this micro-batch."""
        return self.shared_maps.matrices(self.shared)

    def mixed_rows(self, layer: int) -> dict[str, Tensor]:
        """A layer's mixed small rows, once; layers in reach are mixed along with it, for each pass over the source
        takes long and the products little."""
        if layer not in self.mixed:
            order = list(self.depths)
            place = order.index(layer)
            together = order[place : place + MIXED_AT_ONCE]
            split, whole = zip(*(self.depths[j]() for j in together), strict=True)
            self.mixed = dict(zip(together, self._mix(torch.stack(split), torch.stack(whole)), strict=True))
        return self.mixed.pop(layer)

    def _mix(self, split: Tensor, whole: Tensor) -> list[dict[str, Tensor]]:
        if self.sequence_parallel:
            whole = copy_to(whole, self.mesh.tp_group)
        cut = self.source.mix_split(split, self.dtype)
        return [rows | others for rows, others in zip(cut, self.source.mix_whole(whole), strict=True)]

    def grow_gain(self, row: ParamSpec, mixed: Tensor, expand: LinearMap) -> Tensor:
        """A norm's grown gain, complete on every rank."""
        if not self.operator.copied_gains:
            return expand.to(mixed) @ mixed
        source, factor = (self.gain[name] for name in self.operator.gain_names(row))
        return mixed[source] * factor

    def grow_shift(self, row: ParamSpec, mixed: Tensor, expand: LinearMap) -> Tensor:
        """A norm's grown bias, complete on every rank."""
        grown = expand.to(mixed) @ mixed
        if self.operator.is_shared_out(row):
            grown = grown * (self.gain["gain.final"] / self.gain["gain.layers"])
        return grown

    def fresh_rows(self, row: ParamSpec, layer: int) -> Tensor | None:
        """This rank's part of what joins a large layer's row between its maps, in fp32 on the device; mostly None."""
        if self.operator.settings.fresh == "none":
            return None
        key = row.key.format(layer)
        drawn = random_init.added_rows(
            self.operator, key, self.source.rms.get(random_init.scale_reference(self.operator, key), 0.0)
        )
        if drawn is None:
            return None
        return shard(drawn, row, self.mesh.tp, self.mesh.tp_rank).clone().to(device.current_device())

    def map_for(self, maps: dict[str, LinearMap], row: ParamSpec, dim: int) -> tuple[LinearMap, LiftedMap]:
        """The (large x small) matrix that an axis of a row meets, and its lift."""
        axis = row.axes[dim]
        lift = self.operator.frame.lift(axis)
        return map_for_use(maps, lift.map, axis.use is Use.INPUT), lift


def with_lag(grown: Tensor, added: Tensor | None) -> Tensor:
    """A grown tensor, with what the lag's training has added to it."""
    return grown if added is None else grown + added.to(grown.dtype)


def stale(module: nn.Module, runtime: FactoredContext) -> bool:
    """True at a module's first call since the parameters changed (or since it last ran in the other mode)."""
    now = (runtime.generation, module.training, runtime.dtype)
    every_call = module.training and runtime.micro_batches == 1
    if module.seen == now and not every_call:
        return False
    module.seen = now
    return True


class _Share(torch.autograd.Function):
    """A step's shared value in one of its earlier micro-batches: the gradient is added up aside, in fp32."""

    @staticmethod
    def forward(ctx, leaf: Tensor, sums: list[Tensor | None], index: int) -> Tensor:
        ctx.sums, ctx.index = sums, index
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx, grad: Tensor):
        held = ctx.sums[ctx.index]
        ctx.sums[ctx.index] = grad.to(torch.float32, copy=True) if held is None else held.add_(grad)
        return None, None, None


class _Join(torch.autograd.Function):
    """The same value in the last micro-batch: the gradient goes on, with what the others left."""

    @staticmethod
    def forward(ctx, value: Tensor, sums: list[Tensor | None], index: int) -> Tensor:
        ctx.sums, ctx.index = sums, index
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        held, ctx.sums[ctx.index] = ctx.sums[ctx.index], None
        return grad if held is None else held.add_(grad).to(grad.dtype), None, None


class StepCache:
    """Tensors built in a step's first micro-batch and used by all; their graph is walked once, in the last backward."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.calls = 0

    def renew(self, values: list[Tensor]) -> None:
        self.values = values
        self.leaves = [value.detach().requires_grad_() for value in values]
        self.sums: list[Tensor | None] = [None] * len(values)
        self.calls = 0

    def take(self, micro_batches: int) -> list[Tensor]:
        """This micro-batch's view of the values; the graph is let go with the last one's."""
        if not torch.is_grad_enabled():
            return self.values
        self.calls += 1
        assert self.calls <= micro_batches, "more micro-batches in a step than the runtime was told of"
        if self.calls < micro_batches:
            return [_Share.apply(leaf, self.sums, i) for i, leaf in enumerate(self.leaves)]
        joined = [_Join.apply(value, self.sums, i) for i, value in enumerate(self.values)]
        self.values, self.leaves = [], []
        return joined
