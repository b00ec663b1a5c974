"""Checks and searches layouts: the problems that rule one out, its step time, and the layouts that fit a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_ligo.common.errors import ConfigError, LayoutError, Problem
from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.growth.experts import check_copies_of_ranks
from megatron_ligo.planning import pipeline_schedule
from megatron_ligo.planning.memory import estimate_peak_memory, sum_device_bytes
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.planning.traffic import estimate_traffic_seconds
from megatron_ligo.training.initial_weights import check_layout

# Recomputation repeats the forward pass, which is a third of forward and backward.
RECOMPUTE_FACTOR = 4 / 3
MAX_TP = 8  # tensor parallelism stays inside a node


@dataclass(frozen=True)
class LayoutPlan:
    """A valid layout with its cost.

    memory_bytes: tensors on the device of the fullest rank. seconds: time per step, traffic_seconds of it for sending.
    bubble: idle fraction of a step without its traffic.
    """

    job: PlannedJob
    memory_bytes: int
    seconds: float
    bubble: float
    traffic_seconds: float

    @property
    def description(self) -> str:
        parallel, job = self.job.parallel, self.job
        sequence = " + SP" if parallel.sequence_parallel else ""
        context = f" x cp {parallel.cp}" if parallel.cp > 1 else ""
        experts = f" (ep {parallel.ep})" if parallel.ep > 1 else ""
        return f"tp {parallel.tp}{context} x pp {parallel.pp} x dp {job.dp}{experts}, ZeRO {parallel.zero}{sequence}"


def find_problems(job: PlannedJob) -> tuple[str, ...]:
    """Returns the problems that rule out a job's layout; empty if it is valid."""
    parallel = job.parallel
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if job.world_size % model_ranks:
        names = "tp x pp" if parallel.cp == 1 else "tp x cp x pp"
        expected = f"a multiple of {names} = {model_ranks}"
        return (Problem("number of processes", expected, job.world_size),)
    if parallel.pp > 1 and parallel.zero > 1:
        return (Problem(f"zero with pp = {parallel.pp}", "1, the only ZeRO stage under a pipeline", parallel.zero),)
    if job.dp % parallel.ep:
        return (Problem(f"ep = {parallel.ep}", "a divisor of dp", job.dp),)
    samples = job.training.micro_batch_size * job.dp
    if job.training.global_batch_size % samples:
        expected = f"a multiple of micro_batch_size x dp = {samples}"
        return (Problem("global_batch_size", expected, job.training.global_batch_size),)
    try:
        check_layout(job.large, parallel, job.seq_length)
        if job.operator is not None:
            check_copies_of_ranks(job.operator.small, job.large, parallel)
    except (ConfigError, LayoutError) as error:
        return error.problems
    return ()


def plan_layout(job: PlannedJob, flops_per_second: float) -> LayoutPlan:
    """Estimates the cost of a valid layout, assuming that communication does not overlap with compute."""
    recompute = RECOMPUTE_FACTOR if job.training.recompute else 1.0
    busy = job.step_flops() / job.world_size / flops_per_second * recompute
    layers = job.layers_per_stage()
    forward = [busy / 3 * count * job.parallel.pp / sum(layers) / job.micro_batches for count in layers]
    backward = [2 * seconds for seconds in forward]
    seconds = pipeline_schedule.simulate_step(forward, backward, job.micro_batches)
    bubble = pipeline_schedule.compute_bubble(forward, backward, job.micro_batches, seconds)
    sending = estimate_traffic_seconds(job)
    return LayoutPlan(job, sum_device_bytes(estimate_peak_memory(job)), seconds + sending, bubble, sending)


def iterate_layouts(job: PlannedJob) -> Iterator[PlannedJob]:
    """Yields the job at every layout of its processes, invalid ones included; cp stays as it is."""
    experts = _divisors(max(job.large.num_experts, 1))
    sizes = (_powers_of_two(MAX_TP), _powers_of_two(job.large.num_layers), experts, (1, 2, 3))
    for tp, pp, ep, zero in product(*sizes):
        if tp * pp * ep * job.parallel.cp <= job.world_size:
            # A user's own profile is written for one ZeRO stage.
            profile = job.parallel.ds_config if zero == job.parallel.zero else ""
            axes = {"tp": tp, "pp": pp, "cp": job.parallel.cp, "ep": ep, "zero": zero}
            parallel = ParallelSection(**axes, sequence_parallel=tp > 1, ds_config=profile)
            yield replace(job, training=replace(job.training, parallel=parallel))


def find_fitting_layouts(job: PlannedJob, flops_per_second: float, device_bytes: float) -> list[LayoutPlan]:
    """Returns the layouts of the job's processes that fit a device: fastest first, then smallest memory first."""
    plans = [
        plan_layout(candidate, flops_per_second)
        for candidate in iterate_layouts(job)
        if not find_problems(candidate) and sum_device_bytes(estimate_peak_memory(candidate)) <= device_bytes
    ]
    return sorted(plans, key=lambda plan: (round(plan.seconds, 3), plan.memory_bytes))


def find_smallest_layout(
    job: PlannedJob, flops_per_second: float, device_bytes: float, max_devices: int = 4096
) -> LayoutPlan | None:
    """Returns the fastest layout on the fewest devices (a power of two) that hold the job.

    None if `max_devices` do not hold it.
    """
    for world_size in _powers_of_two(max_devices):
        plans = find_fitting_layouts(replace(job, world_size=world_size), flops_per_second, device_bytes)
        if plans:
            return plans[0]
    return None


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers_of_two(limit: int) -> list[int]:
    return [1 << i for i in range(limit.bit_length()) if 1 << i <= limit]
