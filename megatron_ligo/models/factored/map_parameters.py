"""The operator's maps as parameters: this rank's rows of each, made from the operator's global tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_ligo.arch.spec import UNTRAINED_SPACE, ParamSpec
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth.linear_maps import DenseMap, FrozenIdentityMap, LinearMap, LowRankMap, RowSelection
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.growth.width_maps import MapSpec


def local_rows(matrix: Tensor, split: bool, mesh: Mesh) -> Tensor:
    """This rank's rows of a (large x small) matrix."""
    return matrix.chunk(mesh.tp)[mesh.tp_rank] if split and mesh.tp > 1 else matrix


class MapParameters(nn.Module):
    """The maps that all layers share (layer None), or those that one layer has of its own.

    Each side of a map is known as {map}_{side}. Parameters are fp32: {side}, as the operator stores it, expand
    (large / tp, small), contract (small, large / tp); or {side}_u (large / tp, rank) and {side}_v (rank, small).

    Every rank uses its own rows of a map: a V that is shared by the rows of all has partial uses. The residual map is
    whole on every rank, and all its uses are complete (the boundary of tensor parallelism lies in the small space);
    under sequence parallelism they are partial.
    """

    def __init__(self, operator: Operator, mesh: Mesh, layer: int | None, sequence_parallel: bool = False):
        super().__init__()
        self.mesh = mesh
        self.sequence_parallel = sequence_parallel
        self.names: dict[str, str] = {}  # side -> tensor of the operator
        self.learned: dict[str, list[str]] = {}  # side -> its parameters
        self.partial: set[str] = set()  # parameters that every rank holds whole and uses partially
        self.kept: dict[str, tuple[int, int]] = {}  # side -> its frozen identity rows and their first column
        self.starts: dict[str, LinearMap] = {}  # side -> what its product U V is added to
        for spec in operator.maps.values():
            if spec.name != UNTRAINED_SPACE and operator.has_one_a_layer(spec.name) == (layer is not None):
                for side in ("expand", "contract") if operator.has_contract(spec.name) else ("expand",):
                    self._add(operator, spec, side, operator.width_name(spec.name, side, layer))

    def _add(self, operator: Operator, spec: MapSpec, side: str, name: str) -> None:
        key = f"{spec.name}_{side}"
        self.names[key] = name
        self.learned[key] = []
        tensor = operator.tensor(name)
        matrix = local_rows(tensor if side == "expand" else tensor.t(), spec.split, self.mesh)
        rank, rows = operator.rank(spec.name), 0 if spec.split else None
        if rank:
            start = matrix.clone().to(device.current_device())
            self.starts[key] = RowSelection.of(start) or DenseMap(start)
            self._register(key, f"{key}_u", torch.zeros(matrix.shape[0], rank), rows, False)
            self._register(key, f"{key}_v", operator.right_factor(name, rank), None, spec.split)
            return
        if side == "expand" and operator.setting("identity", spec.name) == "frozen":
            first = self.mesh.tp_rank * matrix.shape[0] if spec.split else 0
            kept = max(0, min(spec.small - first, matrix.shape[0]))
            if kept:
                self.kept[key] = kept, first
        if side == "expand":
            self._register(key, key, matrix, rows, False)
        else:
            self._register(key, key, matrix.t(), None if rows is None else 1, False)

    def _register(self, key: str, name: str, tensor: Tensor, cut: int | None, shared_by_rows: bool) -> None:
        parameter = nn.Parameter(tensor.clone(memory_format=torch.contiguous_format).to(device.current_device()))
        parameter.partition_dim = -1 if cut is None else cut
        if cut is not None and self.mesh.tp > 1:
            parameter.tensor_model_parallel = True
        if shared_by_rows or (self.sequence_parallel and cut is None):
            self.partial.add(name)
        self.register_parameter(name, parameter)
        self.learned[key].append(name)

    def forward(self, dtype: torch.dtype) -> list[Tensor]:
        """Every parameter in dtype, for `matrices`.

        ZeRO 3 takes the parameters back when this module's forward ends, and gathers them again when a gradient
        reaches what it returned: so views are returned, and no other module touches the parameters.
        """
        found = []
        for name, parameter in self.named_parameters(recurse=False):
            partial = name in self.partial
            value = copy_to(parameter, self.mesh.tp_group) if partial else parameter
            found.append(value.view_as(value).to(dtype))
        return found

    def matrices(self, tensors: Sequence[Tensor]) -> dict[str, LinearMap]:
        """The (large / tp x small) matrix of each side from what `forward` gave."""
        rest = iter(tensors)
        return {key: self._matrix(key, [next(rest) for _ in names]) for key, names in self.learned.items()}

    def _matrix(self, key: str, tensors: list[Tensor]) -> LinearMap:
        if key in self.starts:
            return LowRankMap(self.starts[key].to(tensors[0]), *tensors)
        if key in self.kept:
            return FrozenIdentityMap(tensors[0], *self.kept[key])
        return DenseMap(tensors[0] if key.endswith("expand") else tensors[0].t())

    def parameters_of(self, key: str) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self.learned[key]]

    def stored(self, key: str) -> Tensor:
        """A side as the operator stores it, this rank's part of it (under ZeRO 3, while its parameters are whole)."""
        dense = self._matrix(key, [parameter.detach() for parameter in self.parameters_of(key)]).dense()
        return dense if key.endswith("expand") else dense.t()


class DepthParameters(nn.Module):
    """A layer's depth maps. split: (rows, small layers), partial uses; whole: (rows, small layers), complete uses."""

    def __init__(self, operator: Operator, layer: int, split: list[ParamSpec], whole: list[ParamSpec]):
        super().__init__()
        self.split = self._parameter(operator, layer, split)
        self.whole = self._parameter(operator, layer, whole)

    @staticmethod
    def _parameter(operator: Operator, layer: int, rows: list[ParamSpec]) -> nn.Parameter:
        weights = torch.stack([operator.tensor(f"depth.{short_key(row)}")[layer] for row in rows])
        return nn.Parameter(weights.to(device.current_device()))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.split.view_as(self.split), self.whole.view_as(self.whole)


def map_for_use(maps: dict[str, LinearMap], name: str, reads: bool) -> LinearMap:
    """The matrix of a map for one use: contract's where it has one and the axis reads."""
    contract = maps.get(f"{name}_contract") if reads else None
    return maps[f"{name}_expand"] if contract is None else contract
