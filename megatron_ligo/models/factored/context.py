"""Settings that all modules of a factored model share, and functions of them.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, TpUse, Use
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to, gather_sequence, reduce_from, scatter_sequence
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth import random_init
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.growth.operator import Operator, copy_gain
from megatron_ligo.growth.width_maps import LiftedMap, apply_map
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.factored.small_weights import OutsideTensors, SmallWeights
from megatron_ligo.models.factored.teacher import Teacher
from megatron_ligo.models.mcore.rotary import build_rotary_embedding
from megatron_ligo.sharding.tensor_parallel import shard


@dataclass
class FactoredContext:
    """Constant inputs and settings of a factored model. `StepState` has the mutable state.

    dtype: that of activations in training.

    micro_batches: number that share the tensors built once per step. Must be 1 under ZeRO 3: if a parameter's first
    gradient of a step arrives after the first micro-batch, DeepSpeed 0.19.8 adds it to the previous step's.

    tokens_per_step: number of tokens to which the products built once per step are applied.

    gradients_each: every micro-batch computes gradients of the shared maps, as ZeRO 2 requires.

    lag: by canonical key, the change of the large model's weights by training from its start (training/lag.py). Each
    weight is then grown(maps) + lag, with lag frozen.

    router_aux_loss: the weight of the routers' load-balancing loss.
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
    router_aux_loss: float = 0.0

    def __post_init__(self) -> None:
        self.rotary = build_rotary_embedding(self.operator.large)
        gain_names = [name for name in self.operator.shapes() if name.startswith("gain.")]
        self.gain_tensors = {name: self.operator.tensor(name).to(device.current_device()) for name in gain_names}
        self.outside_lag: OutsideTensors | None = None
        self.new_features: OutsideTensors | None = None
        if self.operator.settings.fresh == "corner":
            arch, small = self.operator.arch, self.operator.small
            self.new_features = OutsideTensors.read(arch, small, self.mesh, self._new_features_shard)
        if self.lag is not None:
            arch, small = self.operator.arch, self.operator.small
            self.outside_lag = OutsideTensors.read(arch, small, self.mesh, self.lag_shard)

    def rotary_positions(self, h: Tensor, layer: int) -> Tensor | None:
        """Returns a layer's rotary angles of all tokens of this rank's TP group; h (s or s / tp, b, D2) holds its own.

        None if the layer has none.
        """
        if self.rotary is None:
            return None
        return self.rotary(h.shape[0] * (self.mesh.tp if self.sequence_parallel else 1), layer)

    def lag_shard(self, spec: ParamSpec, layer: int | None = None) -> Tensor | None:
        """Returns this rank's shard of a parameter's lag, in the fit's dtype; None without a lag."""
        if self.lag is None:
            return None
        tensor = self.lag(spec.key if layer is None else spec.key.format(layer))
        return shard(tensor, spec, self.mesh.tp, self.mesh.tp_rank).clone().to(device.current_device(), self.dtype)

    def _new_features_shard(self, spec: ParamSpec) -> Tensor | None:
        """Returns this rank's shard of the fixed new features of a table before the layers, fp32; None if it has none.

        (..., D2 - D1, ...): the table's shape with the new residual features only.
        """
        features = random_init.new_features(self.operator, spec)
        if features is None:
            return None
        return shard(features, spec, self.mesh.tp, self.mesh.tp_rank).clone().to(device.current_device())

    def enter_tp_region(self, u: Tensor) -> Tensor:
        """u (s or s / tp, b, D1) -> (s, b, D1), which each TP rank multiplies by its own rows.

        An identity, or a gather under sequence parallelism. The uses are partial: the gradient is summed over TP.
        """
        enter = gather_sequence if self.sequence_parallel else copy_to
        return enter(u, self.mesh.tp_group)

    def leave_tp_region(self, z: Tensor) -> Tensor:
        """z (s, b, D1), a TP rank's summand -> the sum over TP (s, b, D1), or this rank's s / tp tokens of it."""
        leave = scatter_sequence if self.sequence_parallel else reduce_from
        return leave(z, self.mesh.tp_group)

    def enter_partial_use(self, spec: ParamSpec, grown: Tensor) -> Tensor:
        """Returns a replicated grown tensor (any shape) for its use on each TP rank.

        If the use is partial, its gradient is summed over TP. Under sequence parallelism all uses of replicated tensors
        are partial, and the gradients of their inputs are summed instead (LayerMixer, MapParameters).
        """
        if spec.tp_dim is not None or spec.tp_use is TpUse.COMPLETE or self.sequence_parallel:
            return grown
        return copy_to(grown, self.mesh.tp_group)

    def grow_gain(self, spec: ParamSpec, mixed: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """Grows norms' gains, (..., n) -> (..., N), or over all heads -> this rank's (..., N / tp)."""
        if self.operator.copies_gain(spec):
            tensors = (self.gain_tensors[name] for name in self.operator.gain_names(spec))
            source, factor = (shard(tensor, spec, self.mesh.tp, self.mesh.tp_rank) for tensor in tensors)
            return copy_gain(mixed, source, factor)
        inner = self.operator.space_maps.inner_gain_map(spec)
        if inner is not None:
            return mixed @ inner.to(mixed).t()
        if self.operator.space_maps.lift(spec.axes[0]) is None:
            return mixed
        matrix, lift = self.map_for(maps, spec, 0)
        return apply_map(mixed, mixed.dim() - 1, matrix.to(mixed), lift)

    def grow_norm_bias(self, spec: ParamSpec, mixed: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """Grows norms' biases, (..., D1) -> (..., D2), replicated."""
        matrix, lift = self.map_for(maps, spec, 0)
        grown = apply_map(mixed, mixed.dim() - 1, matrix.to(mixed), lift)
        if self.operator.divides_bias(spec):
            grown = grown * (self.gain_tensors["gain.final"] / self.gain_tensors["gain.layers"])
        return grown

    def fresh_rows(self, spec: ParamSpec, layer: int) -> Tensor | None:
        """Returns this rank's shard of the random rows to add between a weight's two maps, fp32, on the device.

        (large out / tp, small in) of a column-parallel weight, the new rows (D2 - D1, small in) of a row-parallel one;
        None if there are none.
        """
        if not random_init.has_added_rows(self.operator, spec):
            return None
        key = spec.key.format(layer)
        rms = self.source.rms.get(random_init.scale_source_key(self.operator, key), 0.0)
        rows = random_init.added_rows(self.operator, key, rms)
        if rows is None:
            return None
        if spec.tp_dim == 0:
            rows = shard(rows, spec, self.mesh.tp, self.mesh.tp_rank)
        else:
            rows = rows[random_init.num_kept_features(self.operator, spec.axes[0]) :]
        return rows.clone().to(device.current_device())

    @property
    def builds_alike(self) -> bool:
        """True if all layers build their tensors in the same way, from the same maps: several at once."""
        operator = self.operator
        has_own_maps = any(operator.has_map_per_layer(name) for name in operator.maps)
        is_plain = not (has_own_maps or operator.arch.starts_unnormalised or operator.arch.has_experts)
        return self.lag is None and operator.settings.fresh == "none" and is_plain

    def map_for(self, maps: dict[str, LinearMap], spec: ParamSpec, dim: int) -> tuple[LinearMap, LiftedMap]:
        """Returns the (large, small) map of a parameter's axis, and its lift over heads."""
        axis = spec.axes[dim]
        lift = self.operator.space_maps.lift(axis)
        return map_for_use(maps, lift.map_name, axis.use is Use.INPUT), lift


def add_lag(grown: Tensor, lag: Tensor | None) -> Tensor:
    """Returns a grown tensor plus its lag (same shape), in the grown tensor's dtype."""
    return grown if lag is None else grown + lag.to(grown.dtype)
