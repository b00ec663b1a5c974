"""The operator's maps as trainable parameters: this rank's rows of the operator's global tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth import layer_kinds
from megatron_ligo.growth.linear_maps import DenseMap, FrozenIdentityMap, LinearMap, LowRankMap, RowSelection
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.growth.width_maps import MapSpec


def local_rows(matrix: Tensor, is_split: bool, mesh: Mesh) -> Tensor:
    """Returns this rank's rows (large / tp, small) of a matrix (large, small) split over TP, else the matrix."""
    return matrix.chunk(mesh.tp)[mesh.tp_rank] if is_split and mesh.tp > 1 else matrix


@dataclass
class MapLayout:
    """Layout of a flat list of parameters as sides of width maps. A side is named {map}_{expand or contract}.

    parameters: a side's parameter names, in the list's order. frozen_rows: (number, first column) of a side's frozen
    identity rows. starts: the fixed matrix to which a side's low-rank product U V is added.
    """

    parameters: dict[str, list[str]] = field(default_factory=dict)
    frozen_rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    starts: dict[str, LinearMap] = field(default_factory=dict)

    @property
    def num_tensors(self) -> int:
        return sum(map(len, self.parameters.values()))

    def matrices(self, tensors: Sequence[Tensor]) -> dict[str, LinearMap]:
        """Returns the (large / tp, small) map of each side from all parameters (shapes: see MapParameters)."""
        rest = iter(tensors)
        return {side: self.matrix(side, [next(rest) for _ in names]) for side, names in self.parameters.items()}

    def matrix(self, side: str, tensors: list[Tensor]) -> LinearMap:
        """Returns the (large / tp, small) map of one side from its own parameters."""
        if side in self.starts:
            return LowRankMap(self.starts[side].to(tensors[0]), *tensors)
        if side in self.frozen_rows:
            return FrozenIdentityMap(tensors[0], *self.frozen_rows[side])
        return DenseMap(tensors[0] if side.endswith("expand") else tensors[0].t())


class MapParameters(nn.Module):
    """The width maps that all layers share (layer None), or one layer's own.

    Parameters are fp32: {side}, as the operator stores it, expand (large / tp, small), contract (small, large / tp);
    or {side}_u (large / tp, rank) and {side}_v (rank, small).

    Each rank uses its own rows of a sharded map, so V, which is replicated, has partial uses. The residual map is
    replicated and all its uses are complete (the TP region lies in the small space), except under sequence parallelism,
    where they are partial.
    """

    def __init__(self, operator: Operator, mesh: Mesh, layer: int | None, sequence_parallel: bool = False):
        super().__init__()
        self.mesh = mesh
        self.sequence_parallel = sequence_parallel
        self.layout = MapLayout()
        self.operator_names: dict[str, str] = {}  # side -> tensor of the operator
        self.partial: set[str] = set()  # replicated parameters with partial uses
        for map_spec in operator.maps.values():
            if map_spec.name in operator.untrained_maps:
                continue
            if operator.has_map_per_layer(map_spec.name) == (layer is not None):
                for kind in ("expand", "contract") if operator.has_contract(map_spec.name) else ("expand",):
                    self._add_side(operator, map_spec, kind, operator.width_name(map_spec.name, kind, layer))

    def _add_side(self, operator: Operator, map_spec: MapSpec, kind: str, name: str) -> None:
        side = f"{map_spec.name}_{kind}"
        self.operator_names[side] = name
        self.layout.parameters[side] = []
        tensor = operator.tensor(name)
        matrix = local_rows(tensor if kind == "expand" else tensor.t(), map_spec.is_sharded, self.mesh)
        rank, partition_dim = operator.rank(map_spec.name), 0 if map_spec.is_sharded else None
        if rank:
            start = matrix.clone().to(device.current_device())
            self.layout.starts[side] = RowSelection.from_matrix(start) or DenseMap(start)
            self._register(side, f"{side}_u", torch.zeros(matrix.shape[0], rank), partition_dim, False)
            self._register(side, f"{side}_v", operator.right_factor(name, rank), None, map_spec.is_sharded)
            return
        if kind == "expand" and operator.setting("identity", map_spec.name) == "frozen":
            first = self.mesh.tp_rank * matrix.shape[0] if map_spec.is_sharded else 0
            frozen = max(0, min(map_spec.small - first, matrix.shape[0]))
            if frozen:
                self.layout.frozen_rows[side] = frozen, first
        if kind == "expand":
            self._register(side, side, matrix, partition_dim, False)
        else:
            self._register(side, side, matrix.t(), None if partition_dim is None else 1, False)

    def _register(self, side: str, name: str, tensor: Tensor, partition_dim: int | None, shared_by_rows: bool) -> None:
        parameter = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format).to(device.current_device()))
        parameter.partition_dim = -1 if partition_dim is None else partition_dim
        if partition_dim is not None and self.mesh.tp > 1:
            parameter.tensor_model_parallel = True
        if shared_by_rows or (self.sequence_parallel and partition_dim is None):
            self.partial.add(name)
        self.register_parameter(name, parameter)
        self.layout.parameters[side].append(name)

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        """Returns every parameter in dtype, in the order of `layout`.

        ZeRO 3 releases the parameters after this forward, and gathers them again when a gradient reaches its outputs.
        So it returns views, and no other module accesses the parameters.
        """
        tensors = []
        for name, parameter in self.named_parameters(recurse=False):
            value = copy_to(parameter, self.mesh.tp_group) if name in self.partial else parameter
            tensors.append(value.view_as(value).to(dtype))
        return tensors

    def side_parameters(self, side: str) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self.layout.parameters[side]]

    def operator_tensor(self, side: str) -> Tensor:
        """Returns this rank's part of a side as the operator stores it: expand (large / tp, small), contract (small,
        large / tp). Under ZeRO 3 its parameters must be gathered first."""
        parameters = [parameter.detach() for parameter in self.side_parameters(side)]
        dense = self.layout.matrix(side, parameters).dense()
        return dense if side.endswith("expand") else dense.t()


class RouterParameters(nn.Module):
    """One layer's router, (experts, D2), which no small model's router grows into."""

    def __init__(self, operator: Operator, mesh: Mesh, layer: int, sequence_parallel: bool):
        super().__init__()
        self.mesh = mesh
        self.is_partial = sequence_parallel
        weight = operator.tensor(operator.router_name(layer))
        self.weight = nn.Parameter(weight.clone().to(device.current_device()))

    def forward(self) -> Tensor:
        """Returns a view, (experts, D2). Under sequence parallelism each TP rank uses it for its own tokens."""
        weight = copy_to(self.weight, self.mesh.tp_group) if self.is_partial else self.weight
        return weight.view_as(weight)


class DepthParameters(nn.Module):
    """One large layer's depth maps, stacked: `split` (params, small layers) for TP-sharded parameters, `whole` (params,
    small layers) for replicated ones. Checkpoints contain these names."""

    def __init__(self, operator: Operator, layer: int, split: list[ParamSpec], whole: list[ParamSpec]):
        super().__init__()
        self.split = self._stack(operator, layer, split)
        self.whole = self._stack(operator, layer, whole)
        self.like_layers = None
        if layer_kinds.has_unlike_layers(operator.small):
            like_layers = layer_kinds.like_layers(operator.small, operator.large, layer)
            self.like_layers = like_layers.to(self.split)

    @staticmethod
    def _stack(operator: Operator, layer: int, specs: list[ParamSpec]) -> nn.Parameter:
        weights = torch.stack([operator.tensor(f"depth.{short_key(spec)}")[layer] for spec in specs])
        return nn.Parameter(weights.to(device.current_device()))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns views of (split, whole). Layers of another kind of attention keep the weight zero."""
        split, whole = self.split.view_as(self.split), self.whole.view_as(self.whole)
        return (split, whole) if self.like_layers is None else (split * self.like_layers, whole * self.like_layers)


def map_for_use(maps: dict[str, LinearMap], name: str, is_input: bool) -> LinearMap:
    """Returns a map's (large, small) matrix for one use: its contract, if it has one, for an input axis."""
    contract = maps.get(f"{name}_contract") if is_input else None
    return maps[f"{name}_expand"] if contract is None else contract
