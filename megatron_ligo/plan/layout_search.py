"""Which layouts a run can have: refused with the reason, too large for a device, or how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ligo.common.errors import ConfigError, LayoutError
from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.plan import pipeline_schedule
from megatron_ligo.plan.memory import estimate_peak_memory, sum_device_bytes
from megatron_ligo.plan.planned_job import PlannedJob
from megatron_ligo.training.initial_weights import check_layout

# A forward pass again for each backward one: 4 thirds of forward and backward.
RECOMPUTE_FACTOR = 4 / 3
MAX_TP = 8  # tensor parallelism stays inside a node


@dataclass(frozen=True)
class LayoutPlan:
    """A layout that can be: bytes of its fullest rank, seconds of a step at a device's rate, the pipeline's bubble."""

    job: PlannedJob
    memory_bytes: int
    seconds: float
    bubble: float

    @property
    def description(self) -> str:
        parallel, job = self.job.parallel, self.job
        sequence = " + SP" if parallel.sequence_parallel else ""
        return f"tp {parallel.tp} x pp {parallel.pp} x dp {job.dp}, ZeRO {parallel.zero}{sequence}"


def find_refusal(job: PlannedJob) -> str | None:
    """Why a layout cannot be, in a line; None if it can."""
    parallel = job.parallel
    if job.world % (parallel.tp * parallel.pp):
        return f"{job.world} processes are no multiple of tp x pp = {parallel.tp * parallel.pp}"
    if parallel.pp > 1 and parallel.zero > 1:
        return f"ZeRO {parallel.zero} with pp = {parallel.pp}: DeepSpeed's pipeline takes ZeRO 1 only"
    passes = job.run.micro_batch_size * job.dp
    if job.run.global_batch_size % passes:
        return f"global_batch_size {job.run.global_batch_size} is no multiple of micro_batch_size x dp = {passes}"
    try:
        check_layout(job.large, parallel, job.seq_length)
    except (ConfigError, LayoutError) as error:
        return " ".join(str(error).split())
    return None


def plan_layout(job: PlannedJob, flops_per_second: float) -> LayoutPlan:
    """A layout that is not refused. Traffic is taken to hide behind the products."""
    busy = job.step_flops() / job.world / flops_per_second * (RECOMPUTE_FACTOR if job.run.recompute else 1.0)
    layers = job.layers_per_stage()
    forward = [busy / 3 * count * job.parallel.pp / sum(layers) / job.micro_batches for count in layers]
    backward = [2 * seconds for seconds in forward]
    seconds = pipeline_schedule.simulate_step(forward, backward, job.micro_batches)
    waiting = pipeline_schedule.compute_bubble(forward, backward, job.micro_batches, seconds)
    return LayoutPlan(job, sum_device_bytes(estimate_peak_memory(job)), seconds, waiting)


def iterate_layouts(job: PlannedJob) -> Iterator[PlannedJob]:
    """The same run on as many processes at every layout, refused ones among them."""
    for tp in _powers_of_two(MAX_TP):
        for pp in _powers_of_two(job.large.num_layers):
            for zero in (1, 2, 3):
                if tp * pp <= job.world:
                    # A profile of the user's own is for one stage.
                    own = job.parallel.ds_config if zero == job.parallel.zero else ""
                    parallel = ParallelSection(tp=tp, pp=pp, zero=zero, sequence_parallel=tp > 1, ds_config=own)
                    yield replace(job, run=replace(job.run, parallel=parallel))


def find_fitting_layouts(job: PlannedJob, flops_per_second: float, device_bytes: float) -> list[LayoutPlan]:
    """The layouts of as many processes that fit into a device, the fastest first (then those with most to spare)."""
    fit = (
        one
        for one in iterate_layouts(job)
        if find_refusal(one) is None and sum_device_bytes(estimate_peak_memory(one)) <= device_bytes
    )
    plans = [plan_layout(one, flops_per_second) for one in fit]
    return sorted(plans, key=lambda found: (round(found.seconds, 3), found.memory_bytes))


def find_smallest_layout(
    job: PlannedJob, flops_per_second: float, device_bytes: float, most: int = 4096
) -> LayoutPlan | None:
    """The fastest layout on the fewest devices (a power of two) that hold the run; None if `most` do not."""
    for world in _powers_of_two(most):
        found = find_fitting_layouts(replace(job, world=world), flops_per_second, device_bytes)
        if found:
            return found[0]
    return None


def _powers_of_two(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
