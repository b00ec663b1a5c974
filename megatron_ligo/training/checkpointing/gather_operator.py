"""From the ranks' parameters to the operator's global tensors, on rank 0."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.arch.spec import UNTRAINED_SPACE
from megatron_ligo.growth.operator import Operator, short_key
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.map_parameters import MapParameters


def gather_operator(module: nn.Module, runtime: FactoredContext) -> dict[str, Tensor]:
    """Every tensor of the operator as it stands now (fp32, CPU) on rank 0, {} elsewhere. Collective.

    module: a FactoredModel or a FactoredPipeline, whose parameters are fp32 and, under ZeRO 3, partitioned.
    """
    mesh = runtime.mesh
    mine: dict[str, Tensor] = {}
    # All data-parallel ranks take part in ZeRO 3's gathering; the first ones have what is asked for.
    for name, tensor in _local_tensors(module, runtime):
        if mesh.dp_rank == 0:
            mine[name] = tensor
    everything: list[dict[str, Tensor]] | None = [{}] * mesh.world_size if dist.get_rank() == 0 else None
    dist.gather_object(mine, everything, dst=0)
    if everything is None:
        return {}
    return _join(everything, runtime)


def _local_tensors(module: nn.Module, runtime: FactoredContext) -> Iterator[tuple[str, Tensor]]:
    """(name, this rank's part): maps by the operator's names, depth vectors as depth.{row}:{layer}."""
    if runtime.mesh.first_stage:
        yield from _map_tensors(module.shared_maps())
    source = runtime.source
    for layer in module.factored_layers():
        yield from _map_tensors(layer.maps)
        for parameter, rows in ((layer.depth.split, source.split_specs), (layer.depth.whole, source.whole_specs)):
            with _gathered([parameter]):
                held = parameter.detach().cpu().clone()
            for row, vector in zip(rows, held, strict=True):
                yield f"depth.{short_key(row)}:{layer.layer}", vector


def _map_tensors(maps: MapParameters) -> Iterator[tuple[str, Tensor]]:
    for key, name in maps.operator_names.items():
        with _gathered(maps.side_parameters(key)):
            yield name, maps.operator_tensor(key).cpu().clone(memory_format=torch.contiguous_format)


def _gathered(parameters: list[nn.Parameter]):
    return deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id"))


def _join(parts: list[dict[str, Tensor]], runtime: FactoredContext) -> dict[str, Tensor]:
    operator, mesh = runtime.operator, runtime.mesh
    found = {}
    for name, shape in operator.shapes().items():
        kind, _, rest = name.partition(".")
        if kind == "gain" or rest.partition(".")[0] == UNTRAINED_SPACE:
            found[name] = operator.tensor(name)
        elif kind == "depth":
            found[name] = torch.stack([_first(parts, f"{name}:{layer}") for layer in range(shape[0])])
        else:
            found[name] = _join_map(parts, name, rest.partition(".")[0], operator, mesh)
        assert tuple(found[name].shape) == shape, f"{name}: {tuple(found[name].shape)}, not {shape}"
    return found


def _first(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    return next(part[name] for part in parts if name in part)


def _join_map(parts: list[dict[str, Tensor]], name: str, map_name: str, operator: Operator, mesh) -> Tensor:
    held = [part[name] for part in parts if name in part]
    if not operator.maps[map_name].is_sharded:
        return held[0]
    assert len(held) == mesh.tp, f"{name}: {len(held)} parts for tp {mesh.tp}"
    return torch.cat(held, dim=0 if name.endswith("expand") else 1)
