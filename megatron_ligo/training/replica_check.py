"""Checks that the replicas of every parameter are equal, by a short summary of each.

A checksum tells one differing bit. On GPUs kernels may add in another order on each rank, so a tolerance allows a
difference, relative to the norm, of sums over parts of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.arch.mcore_names import EXPERT_NUMBER
from megatron_ligo.common.errors import ErrorCollector, ReplicaError
from megatron_ligo.distributed import device
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.training.engine import Engine

# Sums over this many interleaved parts of a tensor tell how far two replicas are apart.
SKETCH_SIZE = 64


def check_replicas(engine: Engine, step: int) -> None:
    """Raises ReplicaError on all ranks, naming parameters and ranks, if replicas of a parameter differ. Collective.

    Data- and context-parallel ranks hold replicas of every parameter (under ZeRO 3, of none), tensor-parallel ranks of
    the parameters that are not sharded, and pipeline stages of the tied ones. Expert-parallel ranks divide experts.
    """
    errors = ErrorCollector(f"step {step}: ranks that must hold the same numbers do not", ReplicaError)
    tolerance = engine.section.replica_tolerance
    for group, replicas in replicas_by_group(engine):
        _compare(group, replicas, tolerance, errors)
    all_ranks().run_on_all(errors.raise_if_any)


def replicas_by_group(engine: Engine) -> Iterator[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
    """Yields each group of ranks with the local tensors, of any shape, that its ranks replicate, by name."""
    mesh, module = engine.mesh, engine.module
    parameters = dict(module.named_parameters())
    whole = {name: tensor for name, tensor in parameters.items() if not hasattr(tensor, "ds_id")}
    if mesh.ep > 1:
        # Under ZeRO 3 these ranks hold the same part.
        shared = {name: tensor for name, tensor in parameters.items() if not EXPERT_NUMBER.search(name)}
        yield mesh.ep_group, {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in shared.items()}
    if mesh.expert_dp > 1:
        yield mesh.expert_dp_group, whole
    if mesh.tp > 1:
        unsharded = {name: tensor for name, tensor in parameters.items() if not _is_tp_sharded(tensor)}
        yield mesh.tp_group, {name: getattr(tensor, "ds_tensor", tensor) for name, tensor in unsharded.items()}
    if mesh.pp > 1:
        for key, tied in module.tied_comms.items():
            weights = {f"{key}.{name}": _get_nested(tied["module"], name) for name in tied["weight_attr"]}
            yield tied["group"], weights


def _is_tp_sharded(parameter: Tensor) -> bool:
    return getattr(parameter, "partition_dim", -1) >= 0


def _get_nested(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _compare(
    group: dist.ProcessGroup, replicas: dict[str, Tensor], tolerance: float | None, errors: ErrorCollector
) -> None:
    if not replicas or dist.get_rank() not in dist.get_process_group_ranks(group):
        return
    local = torch.stack([_summarise(tensor) for tensor in replicas.values()])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    ranks = dist.get_process_group_ranks(group)
    # One copy to the host for all parameters and ranks.
    summaries = torch.stack(gathered).cpu()
    for name, tensor, found in zip(replicas, replicas.values(), summaries.unbind(1), strict=True):
        allowed = device.replica_tolerance(tensor.dtype) if tolerance is None else tolerance
        odd_ranks = [rank for rank, odd in zip(ranks, _find_odd(found, allowed), strict=True) if odd]
        if odd_ranks:
            hint = "Start again from the checkpoint."
            errors.add(name, f"equal replicas on ranks {ranks}", f"others on {odd_ranks}", hint)


def _find_odd(summaries: Tensor, tolerance: float) -> list[bool]:
    """Tells which replicas differ from the majority. summaries: (ranks, SKETCH_SIZE + 2), from `_summarise`."""
    checksums = summaries[:, 0].contiguous().view(torch.int64).tolist()
    reference = checksums.index(max(checksums, key=checksums.count))
    norm, sketches = summaries[reference, 1].sqrt(), summaries[:, 2:]
    distances = (sketches - sketches[reference]).norm(dim=1)
    # A distance that is not a number is too far.
    near = [bool(distance <= tolerance * norm) and tolerance > 0 for distance in distances]
    return [checksum != checksums[reference] and not is_near for checksum, is_near in zip(checksums, near, strict=True)]


def _summarise(tensor: Tensor) -> Tensor:
    """Returns the bits of a checksum, the sum of squares, and the sums over interleaved parts: (SKETCH_SIZE + 2,) fp64.

    The checksum is the sum of the tensor's bits, read as integers, which wraps around.
    """
    flat = tensor.detach().reshape(-1)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    checksum = flat.view(word).sum(dtype=torch.int64).view(torch.float64)
    whole = flat.numel() // SKETCH_SIZE * SKETCH_SIZE
    sketch = flat[:whole].view(-1, SKETCH_SIZE).sum(0, dtype=torch.float64)
    rest = flat[whole:].to(torch.float64)
    sketch = sketch + torch.nn.functional.pad(rest, (0, SKETCH_SIZE - rest.numel()))
    squares = torch.linalg.vector_norm(flat, dtype=torch.float64).square()
    return torch.cat([checksum.view(1), squares.view(1), sketch])
