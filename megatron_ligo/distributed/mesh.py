"""The process mesh: who this rank is, and its groups. The only reader of process groups in the code."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from megatron_ligo.distributed import device  # before Megatron-core, whose import it makes cheaper on a CPU

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from megatron_ligo.common.errors import LayoutError, Problem
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup

T = TypeVar("T")


@dataclass(frozen=True)
class Mesh:
    """Sizes, this rank's coordinates (tp fastest, then dp, then pp: Megatron's order) and its groups.

    mix_group holds the ranks among which a stage's source weights are divided (see models/factored/small_weights.py).
    """

    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    tp_dp_group: dist.ProcessGroup

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def rank(self) -> int:
        return (self.pp_rank * self.dp + self.dp_rank) * self.tp + self.tp_rank

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def rank_of(self, tp: int, pp: int, dp: int = 0) -> int:
        """Global rank at a coordinate."""
        return (pp * self.dp + dp) * self.tp + tp


def init_distributed(timeout_minutes: float = 10.0) -> None:
    """Joins the process group that the launcher describes (one process where there is no launcher)."""
    device.install_cpu_shims()
    # Whoever makes a group says no time-out of its own: not Megatron-core, not DeepSpeed.
    timeout = timedelta(minutes=timeout_minutes)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if deepspeed.comm.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    try:
        deepspeed.init_distributed(
            dist_backend=device.backend(),
            auto_mpi_discovery=False,
            timeout=timeout,
            verbose=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "If the port is in use, choose another with --master_port."
        found = str(error).splitlines()[0]
        raise LayoutError(Problem(where, "a free port that every process reaches", found, hint)) from error


def build_mesh(tp: int, pp: int) -> Mesh:
    """Divides the processes into tp x pp x dp; dp is what remains. Collective over all processes."""
    world = dist.get_world_size()
    with all_ranks().agree():
        if world % (tp * pp):
            hint = "Start that many processes, or change tp and pp."
            expected = f"a multiple of tp x pp = {tp} x {pp} = {tp * pp}"
            raise LayoutError(Problem("processes", expected, world, hint))
    if not _is_made(tp, pp):
        # gloo keeps three threads a group that wake up a hundred times a second: no group that nobody uses.
        parallel_state.destroy_model_parallel()
        minutes = distributed_c10d.default_pg_timeout.total_seconds() / 60
        parallel_state.initialize_model_parallel(
            tp, pp, create_gloo_process_groups=False, distributed_timeout_minutes=minutes
        )
    return Mesh(
        tp=tp,
        pp=pp,
        dp=world // (tp * pp),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        tp_dp_group=parallel_state.get_tensor_and_data_parallel_group(),
    )


def _is_made(tp: int, pp: int) -> bool:
    """True where Megatron's groups of that layout are there already."""
    if not parallel_state.model_parallel_is_initialized():
        return False
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return sizes == (tp, pp)


def all_ranks() -> RankGroup:
    """All ranks of the job; a single rank where no process group was joined."""
    if not dist.is_initialized():
        return SINGLE_RANK
    return RankGroup(dist.get_rank(), dist.get_world_size(), _all_gather_objects)


def _all_gather_objects(value: T) -> list[T]:
    """Returns every rank's value (small and picklable) on every rank. Collective."""
    if dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def max_over_ranks(value: int) -> int:
    """Returns the largest of the ranks' integers. Collective."""
    maximum = torch.tensor([value], device=device.current_device())
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)


class DeepSpeedMpu:
    """What DeepSpeed asks of Megatron when there is no pipeline (with one, its own grid answers)."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tp_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.dp_group
