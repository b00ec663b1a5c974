"""The process mesh: this rank's coordinates and groups. Only this module asks Megatron-core for process groups."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import TypeVar

from megatron_ligo.distributed import device  # before Megatron-core, whose import it makes cheaper on a CPU

# isort: split
import deepspeed
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d

from megatron_ligo.common.errors import LayoutError, Problem
from megatron_ligo.distributed import rank_watch
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.distributed.hostfile import check_world_size
from megatron_ligo.distributed.parallel_dims import ParallelDims
from megatron_ligo.distributed.rank_watch import WatchTimes

T = TypeVar("T")
NCCL_MARGIN = timedelta(minutes=2)


@dataclass(frozen=True)
class Mesh:
    """The parallel axes of the job, this rank's coordinates on them, and its process groups.

    cp_group: ranks that hold parts of the same sequences. replica_group: the data- and context-parallel ranks, which
    hold the same parameters but for experts. stage_group: all ranks of this rank's pipeline stage. ep_group: the
    data-parallel ranks that divide the experts among them; tp_ep_group: those times the tensor-parallel ranks;
    expert_dp_group: the replicas that hold the same experts as this one.
    """

    dims: ParallelDims
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    stage_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    tp_ep_group: dist.ProcessGroup
    expert_dp_group: dist.ProcessGroup

    @property
    def tp(self) -> int:
        return self.dims.tp

    @property
    def pp(self) -> int:
        return self.dims.pp

    @property
    def dp(self) -> int:
        return self.dims.dp

    @property
    def ep(self) -> int:
        return self.dims.ep

    @property
    def ep_rank(self) -> int:
        return self.dp_rank % self.ep

    @property
    def expert_dp(self) -> int:
        """Number of ranks that hold the same experts."""
        return self.replicas // self.ep

    @property
    def cp(self) -> int:
        return self.dims.cp

    @property
    def replicas(self) -> int:
        return self.dims.replicas

    @property
    def replica_rank(self) -> int:
        return self.dp_rank * self.cp + self.cp_rank

    def without_experts(self) -> Mesh:
        """Returns the mesh of an engine whose parameters all data-parallel ranks replicate, whoever computes what."""
        dims = replace(self.dims, ep=1)
        return replace(self, dims=dims, tp_ep_group=self.tp_group, expert_dp_group=self.replica_group)

    @property
    def world_size(self) -> int:
        return self.dims.world_size

    @property
    def first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        return self.pp_rank == self.pp - 1

    def sequence_part(self, sequence_parallel: bool) -> int:
        """Returns which of the equal parts of a sequence this rank holds. sequence_parallel: TP ranks share a part."""
        return self.cp_rank * self.tp + self.tp_rank if sequence_parallel else self.cp_rank


def init_distributed(timeout_minutes: float = 10.0) -> None:
    """Joins the launcher's process group; without a launcher, a group of one. Raises LayoutError if that fails."""
    check_world_size()
    device.install_cpu_shims()
    device.select_local_device()
    # Megatron-core and DeepSpeed create groups without a timeout of their own.
    timeout = timedelta(minutes=timeout_minutes)
    if device.needs_rank_watch():
        # The watch speaks before nccl's own watchdog aborts the process.
        timeout += NCCL_MARGIN
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if deepspeed.comm.is_initialized():
        return
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    try:
        deepspeed.init_distributed(
            dist_backend=device.communication_backend(),
            auto_mpi_discovery=False,
            timeout=timeout,
            verbose=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        hint = "If the port is in use, choose another with --master_port."
        found = str(error).splitlines()[0]
        raise LayoutError(Problem(where, "a free port that every process reaches", found, hint)) from error
    if device.needs_rank_watch():
        rank_watch.start_watch(WatchTimes(stuck=timeout_minutes * 60))


def current_tp_group() -> dist.ProcessGroup:
    """Returns the tensor-parallel group of the mesh that was built last."""
    return parallel_state.get_tensor_model_parallel_group()


def current_cp_group() -> dist.ProcessGroup | None:
    """Returns the context-parallel group of the mesh that was built last; None without a mesh."""
    return parallel_state.get_context_parallel_group(check_initialized=False)


def context_place() -> tuple[int, int]:
    """Returns this rank's number among the context-parallel ranks of the mesh that was built last, and their count."""
    group = current_cp_group()
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def build_mesh(tp: int, pp: int, ep: int = 1, cp: int = 1) -> Mesh:
    """Divides the ranks over the axes, dp into groups of ep, and creates their groups. Collective.

    Raises LayoutError for a remainder.
    """
    with all_ranks().agree():
        dims = ParallelDims.divide(dist.get_world_size(), tp, pp, ep, cp)
    if not _groups_exist(dims):
        # A gloo group has three threads that wake up a hundred times a second, so unused ones are not created.
        parallel_state.destroy_model_parallel()
        minutes = distributed_c10d.default_pg_timeout.total_seconds() / 60
        parallel_state.initialize_model_parallel(
            tp,
            pp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            create_gloo_process_groups=False,
            distributed_timeout_minutes=minutes,
        )
    mesh = _read_mesh(dims)
    place = (mesh.tp_rank, mesh.pp_rank, mesh.dp_rank, mesh.cp_rank)
    assert dims.global_rank(*place) == dist.get_rank(), "rank order"
    return mesh


def current_mesh() -> Mesh:
    """Returns the mesh of the groups that Megatron-core has now, such as those of somebody's own training script.

    Raises LayoutError if it has none.
    """
    if not has_groups():
        hint = "Call parallel_state.initialize_model_parallel first."
        raise LayoutError(Problem("Megatron-core's process groups", "one for each parallel axis", "none", hint))
    return _read_mesh(_read_dims())


def _read_dims() -> ParallelDims:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size()
    cp = parallel_state.get_context_parallel_world_size()
    return ParallelDims.divide(dist.get_world_size(), tp, pp, ep, cp)


def _read_mesh(dims: ParallelDims) -> Mesh:
    return Mesh(
        dims=dims,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        stage_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        ep_group=parallel_state.get_expert_model_parallel_group(),
        tp_ep_group=parallel_state.get_expert_tensor_and_model_parallel_group(),
        expert_dp_group=parallel_state.get_expert_data_parallel_group(),
    )


def forget_groups() -> None:
    """Forgets the groups of the last mesh, for the default group that they belong to ends."""
    parallel_state.destroy_model_parallel()


def has_groups() -> bool:
    """True if Megatron-core has groups, such as those of somebody's own training script."""
    return parallel_state.model_parallel_is_initialized()


def _groups_exist(dims: ParallelDims) -> bool:
    """True if Megatron-core already has the groups of this layout."""
    return has_groups() and _read_dims() == dims


def all_ranks() -> RankGroup:
    """Returns the group of all ranks of the job; of a single rank if no process group was joined."""
    if not dist.is_initialized():
        return SINGLE_RANK
    return RankGroup(dist.get_rank(), dist.get_world_size(), _all_gather_objects)


@cache
def cpu_group() -> dist.ProcessGroup:
    """Returns a group of all ranks that sends CPU tensors and objects. Its first call is collective.

    The default group is NCCL's on GPUs: every object would pass through GPU memory.
    """
    world = dist.group.WORLD
    return world if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def _all_gather_objects(value: T) -> list[T]:
    """Returns every rank's value (small and picklable) on every rank. Collective."""
    if dist.get_world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=cpu_group())
    return values


def max_over_ranks(value: int) -> int:
    """Returns the largest of the ranks' integers. Collective."""
    maximum = torch.tensor([value], device=device.current_device())
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return int(maximum)


class DeepSpeedMpu:
    """Megatron's mpu interface, which DeepSpeed calls without a pipeline; with one, it uses its own grid.

    DeepSpeed sees expert parallelism as a part of model parallelism: it reduces and partitions over the ranks that
    hold the same experts. The model itself averages the gradients of all else over the expert-parallel ranks.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self.mesh.ep_rank * self.mesh.tp + self.mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp * self.mesh.ep

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tp_ep_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.mesh.replica_rank // self.mesh.ep

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.expert_dp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.expert_dp_group
