"""Are the copies of a parameter that several ranks hold still the same, bit for bit? One number a parameter says so."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_ligo.common.errors import ErrorCollector, ReplicaError
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.training.engine import Engine


def check_replicas(engine: Engine, step: int) -> None:
    """ReplicaError on all ranks, naming parameters and ranks, if copies of a parameter differ. Collective.

    Data-parallel ranks hold copies of everything (but under ZeRO 3, of nothing), tensor-parallel ranks of what is not
    cut, pipeline stages of what is tied.
    """
    errors = ErrorCollector(f"step {step}: ranks that must hold the same numbers do not", ReplicaError)
    for group, named in _copies(engine):
        _compare(group, named, errors)
    all_ranks().run_on_all(errors.raise_if_any)


def _copies(engine: Engine) -> Iterator[tuple[dist.ProcessGroup, dict[str, Tensor]]]:
    mesh, module = engine.mesh, engine.module
    whole = {name: held for name, held in module.named_parameters() if not hasattr(held, "ds_id")}
    if mesh.dp > 1:
        yield mesh.dp_group, whole
    if mesh.tp > 1:
        uncut = {name: held for name, held in module.named_parameters() if not _cut(held)}
        yield mesh.tp_group, {name: getattr(held, "ds_tensor", held) for name, held in uncut.items()}
    if mesh.pp > 1:
        for key, tied in module.tied_comms.items():
            weights = {f"{key}.{name}": _of(tied["module"], name) for name in tied["weight_attr"]}
            yield tied["group"], weights


def _cut(parameter: Tensor) -> bool:
    return getattr(parameter, "tensor_model_parallel", False)


def _of(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _compare(group: dist.ProcessGroup, named: dict[str, Tensor], errors: ErrorCollector) -> None:
    if not named or dist.get_rank() not in dist.get_process_group_ranks(group):
        return
    own = torch.stack([_checksum(held) for held in named.values()])
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    ranks = dist.get_process_group_ranks(group)
    for index, name in enumerate(named):
        sums = [int(part[index]) for part in parts]
        usual = max(sums, key=sums.count)
        odd = [rank for rank, found in zip(ranks, sums, strict=True) if found != usual]
        if odd:
            errors.add(name, f"one content on ranks {ranks}", f"another on {odd}", "Start again from the checkpoint.")


def _checksum(held: Tensor) -> Tensor:
    """Sum of the bits, word by word, without a copy (int64, which wraps around)."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[held.element_size()]
    return held.detach().reshape(-1).view(words).sum(dtype=torch.int64)
