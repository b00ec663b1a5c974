"""Checks that the replicas of every parameter are bitwise equal, by one checksum per parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.common.errors import ErrorCollector, ReplicaError
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.training.engine import Engine


def check_replicas(engine: Engine, step: int) -> None:
    """Raises ReplicaError on all ranks, naming parameters and ranks, if replicas of a parameter differ. Collective.

    Data-parallel ranks hold replicas of every parameter (under ZeRO 3, of none), tensor-parallel ranks of the
    parameters that are not sharded, and pipeline stages of the tied ones.
    """
    errors = ErrorCollector(f"step {step}: ranks that must hold the same numbers do not", ReplicaError)
    for group, replicas in replicas_by_group(engine):
        _compare(group, replicas, errors)
    all_ranks().run_on_all(errors.raise_if_any)


def replicas_by_group(engine: Engine) -> Iterator[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
    """Yields each group of ranks with the local tensors, of any shape, that its ranks replicate, by name."""
    mesh, module = engine.mesh, engine.module
    parameters = dict(module.named_parameters())
    if mesh.dp > 1:
        yield mesh.dp_group, {name: tensor for name, tensor in parameters.items() if not hasattr(tensor, "ds_id")}
    if mesh.tp > 1:
        unsharded = {name: tensor for name, tensor in parameters.items() if not _is_tp_sharded(tensor)}
        yield mesh.tp_group, {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in unsharded.items()}
    if mesh.pp > 1:
        for key, tied in module.tied_comms.items():
            weights = {f"{key}.{name}": _get_nested(tied["module"], name) for name in tied["weight_attr"]}
            yield tied["group"], weights


def _is_tp_sharded(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _get_nested(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _compare(group: dist.ProcessGroup, replicas: dict[str, Tensor], errors: ErrorCollector) -> None:
    if not replicas or dist.get_rank() not in dist.get_process_group_ranks(group):
        return
    local = torch.stack([_checksum(tensor) for tensor in replicas.values()])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    ranks = dist.get_process_group_ranks(group)
    # One copy to the host for all parameters and ranks.
    for name, *checksums in zip(replicas, *torch.stack(gathered).tolist(), strict=True):
        majority = max(checksums, key=checksums.count)
        odd_ranks = [rank for rank, checksum in zip(ranks, checksums, strict=True) if checksum != majority]
        if odd_ranks:
            hint = "Start again from the checkpoint."
            errors.add(name, f"equal replicas on ranks {ranks}", f"others on {odd_ranks}", hint)


def _checksum(tensor: Tensor) -> Tensor:
    """Sums the tensor's bits, read as integers, without a copy. Returns a scalar int64, which wraps around."""
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(word).sum(dtype=torch.int64)
