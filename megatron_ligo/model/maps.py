"""The operator's maps as parameters: this rank's rows of each, made from the operator's global tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ligo.arch.rows import Row
from megatron_ligo.growth.operator import Operator, short
from megatron_ligo.parallel import accelerator
from megatron_ligo.parallel.mesh import Mesh


def local(tensor: Tensor, side: str, split: bool, mesh: Mesh) -> Tensor:
    """This rank's part of a map: rows of expand, columns of contract."""
    if not split or mesh.tp == 1:
        return tensor
    return tensor.chunk(mesh.tp, dim=0 if side == "expand" else 1)[mesh.tp_rank]


class Maps(nn.Module):
    """The maps that all layers share (layer None), or those that one layer has of its own.

    Parameters are fp32, named {map}_{side}: expand (large / tp, small), contract (small, large / tp); the
    residual map is whole on every rank, for all its uses are complete (the boundary of tensor parallelism lies
    in the small space).
    """

    def __init__(self, operator: Operator, mesh: Mesh, layer: int | None):
        super().__init__()
        self.names: dict[str, str] = {}  # parameter -> tensor of the operator
        self.frozen: dict[str, Tensor] = {}
        for spec in operator.maps.values():
            if operator.has_one_a_layer(spec.name) != (layer is not None):
                continue
            for side in ("expand", "contract") if operator.has_contract(spec.name) else ("expand",):
                name = operator.width_name(spec.name, side, layer)
                mine = local(operator.tensor(name), side, spec.split, mesh).clone().to(accelerator.device())
                parameter = nn.Parameter(mine)
                if spec.split and mesh.tp > 1:
                    parameter.tensor_model_parallel = True
                self.register_parameter(f"{spec.name}_{side}", parameter)
                self.names[f"{spec.name}_{side}"] = name
            if operator.setting("identity", spec.name) == "frozen":
                identity = local(torch.eye(spec.large, spec.small), "expand", spec.split, mesh)
                first = mesh.tp_rank * identity.shape[0] if spec.split else 0
                kept = max(0, min(spec.small - first, identity.shape[0]))
                self.frozen[f"{spec.name}_expand"] = identity[:kept].clone().to(accelerator.device())

    def forward(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every map in dtype, by parameter name; frozen identity rows in their place.

        ZeRO 3 takes the parameters back when this module's forward ends, and gathers them again when a gradient
        reaches what it returned: so views are returned, and no other module touches the parameters.
        """
        found = {}
        for name, parameter in self.named_parameters(recurse=False):
            found[name] = self.effective(name, parameter).to(dtype)
        return found

    def effective(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with its frozen rows."""
        fixed = self.frozen.get(name)
        if fixed is None or not fixed.shape[0]:
            return parameter.view_as(parameter)
        return torch.cat([fixed, parameter[fixed.shape[0] :]])


class Depth(nn.Module):
    """A layer's depth maps. split: (rows, small layers), partial uses; whole: (rows, small layers), complete uses."""

    def __init__(self, operator: Operator, layer: int, split: list[Row], whole: list[Row]):
        super().__init__()
        self.split = self._parameter(operator, layer, split)
        self.whole = self._parameter(operator, layer, whole)

    @staticmethod
    def _parameter(operator: Operator, layer: int, rows: list[Row]) -> nn.Parameter:
        weights = torch.stack([operator.tensor(f"depth.{short(row)}")[layer] for row in rows])
        return nn.Parameter(weights.to(accelerator.device()))

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.split.view_as(self.split), self.whole.view_as(self.whole)


def matrix_of(maps: dict[str, Tensor], name: str, reads: bool) -> Tensor:
    """The (large x small) matrix of a map for one use: contract^T where it has one and the axis reads."""
    contract = maps.get(f"{name}_contract") if reads else None
    return maps[f"{name}_expand"] if contract is None else contract.t()
