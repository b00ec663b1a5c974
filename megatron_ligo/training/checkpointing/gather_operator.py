"""Gathers the operator's global tensors on rank 0 from the parameters of all ranks."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.distributed.mesh import Mesh, all_ranks, cpu_group
from megatron_ligo.growth.operator import ROUTERS, Operator, short_key
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.map_parameters import MapParameters


def gather_operator(module: nn.Module, context: FactoredContext) -> dict[str, Tensor]:
    """Returns every tensor of the operator in its current state (fp32, CPU) on rank 0, {} elsewhere. Collective.

    Shapes are `Operator.shapes`. module: a FactoredModel or a FactoredPipeline, whose parameters are fp32 and, under
    ZeRO 3, partitioned.
    """
    local: dict[str, Tensor] = {}
    # ZeRO 3 gathers over all replicas; the first of them keeps the result.
    for name, tensor in _local_tensors(module, context):
        if context.mesh.replica_rank == 0:
            local[name] = tensor
    parts = _send_to_rank_0(local, context.operator)
    return _join(parts, context) if dist.get_rank() == 0 else {}


def _send_to_rank_0(local: dict[str, Tensor], operator: Operator) -> list[dict[str, Tensor]]:
    """Returns the parts of all ranks, in rank order, on rank 0: a replicated tensor from its first rank alone.

    Rank 0 receives the operator's bytes once, whatever the number of ranks. Collective.
    """
    headers = all_ranks().all_gather([(name, tensor.shape) for name, tensor in local.items()])
    parts: list[dict[str, Tensor]] = []
    seen: set[str] = set()
    for rank, header in enumerate(headers):
        part: dict[str, Tensor] = {}
        for name, shape in header:
            if name in seen and not _is_sharded(name, operator):
                continue
            seen.add(name)
            if rank == dist.get_rank():
                part[name] = local[name]
                if rank:
                    dist.send(local[name], dst=0, group=cpu_group())
            elif dist.get_rank() == 0:
                part[name] = torch.empty(shape)
                dist.recv(part[name], src=rank, group=cpu_group())
        parts.append(part)
    return parts


def _is_sharded(name: str, operator: Operator) -> bool:
    """True for a map that tensor parallelism splits."""
    kind, _, rest = name.partition(".")
    return kind not in ("gain", "depth", ROUTERS) and operator.maps[rest.partition(".")[0]].is_sharded


def _local_tensors(module: nn.Module, context: FactoredContext) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, this rank's part): maps under the operator's names, depth vectors as depth.{param}:{layer}."""
    if context.mesh.first_stage:
        yield from _map_tensors(module.shared_maps())
    source = context.source
    for layer in module.factored_layers():
        yield from _map_tensors(layer.maps)
        if layer.router is not None:
            with _gather_zero3([layer.router.weight]):
                yield context.operator.router_name(layer.layer), layer.router.weight.detach().cpu().clone()
        for parameter, specs in ((layer.depth.split, source.split_specs), (layer.depth.whole, source.whole_specs)):
            with _gather_zero3([parameter]):
                vectors = parameter.detach().cpu().clone()
            for spec, vector in zip(specs, vectors, strict=True):
                yield f"depth.{short_key(spec)}:{layer.layer}", vector


def _map_tensors(maps: MapParameters) -> Iterator[tuple[str, Tensor]]:
    for side, name in maps.operator_names.items():
        with _gather_zero3(maps.side_parameters(side)):
            yield name, maps.operator_tensor(side).cpu().clone(memory_format=torch.contiguous_format)


def _gather_zero3(parameters: list[nn.Parameter]):
    return deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id"))


def _join(parts: list[dict[str, Tensor]], context: FactoredContext) -> dict[str, Tensor]:
    operator, mesh = context.operator, context.mesh
    tensors = {}
    for name, shape in operator.shapes().items():
        kind, _, rest = name.partition(".")
        if kind == "gain" or rest.partition(".")[0] in operator.untrained_maps:
            tensors[name] = operator.tensor(name)
        elif kind == ROUTERS:
            tensors[name] = _first_part(parts, name)
        elif kind == "depth":
            tensors[name] = torch.stack([_first_part(parts, f"{name}:{layer}") for layer in range(shape[0])])
        else:
            tensors[name] = _join_map(parts, name, rest.partition(".")[0], operator, mesh)
        assert tuple(tensors[name].shape) == shape, f"{name}: {tuple(tensors[name].shape)}, not {shape}"
    return tensors


def _first_part(parts: list[dict[str, Tensor]], name: str) -> Tensor:
    return next(part[name] for part in parts if name in part)


def _join_map(parts: list[dict[str, Tensor]], name: str, map_name: str, operator: Operator, mesh: Mesh) -> Tensor:
    shards = [part[name] for part in parts if name in part]
    if not operator.maps[map_name].is_sharded:
        return shards[0]
    assert len(shards) == mesh.tp, f"{name}: {len(shards)} shards for tp {mesh.tp}"
    return torch.cat(shards, dim=0 if name.endswith("expand") else 1)
