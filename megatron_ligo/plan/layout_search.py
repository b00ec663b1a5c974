"""Which layouts a run can have: refused with the reason, too large for a device, or how long a step takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_ligo.common.errors import ConfigError, LayoutError
from megatron_ligo.config.run_config import ParallelSection
from megatron_ligo.plan import pipeline_schedule
from megatron_ligo.plan.memory import memory, on_device
from megatron_ligo.plan.planned_job import Job
from megatron_ligo.training.initial_weights import check_layout

# A forward pass again for each backward one: 4 thirds of forward and backward.
RECOMPUTED = 4 / 3
LARGEST_TP = 8  # tensor parallelism stays inside a node


@dataclass(frozen=True)
class Plan:
    """A layout that can be: bytes of its fullest rank, seconds of a step at a device's rate, the pipeline's bubble."""

    job: Job
    memory: int
    seconds: float
    bubble: float

    @property
    def words(self) -> str:
        parallel, job = self.job.parallel, self.job
        sequence = " + SP" if parallel.sequence_parallel else ""
        return f"tp {parallel.tp} x pp {parallel.pp} x dp {job.dp}, ZeRO {parallel.zero}{sequence}"


def refusal(job: Job) -> str | None:
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


def plan(job: Job, flops_per_second: float) -> Plan:
    """A layout that is not refused. Traffic is taken to hide behind the products."""
    busy = job.flops() / job.world / flops_per_second * (RECOMPUTED if job.run.recompute else 1.0)
    layers = job.stages()
    forward = [busy / 3 * count * job.parallel.pp / sum(layers) / job.micro_batches for count in layers]
    backward = [2 * seconds for seconds in forward]
    seconds = pipeline_schedule.simulate(forward, backward, job.micro_batches)
    waiting = pipeline_schedule.bubble(forward, backward, job.micro_batches, seconds)
    return Plan(job, on_device(memory(job)), seconds, waiting)


def candidates(job: Job) -> Iterator[Job]:
    """The same run on as many processes at every layout, refused ones among them."""
    for tp in _powers(LARGEST_TP):
        for pp in _powers(job.large.num_layers):
            for zero in (1, 2, 3):
                if tp * pp <= job.world:
                    # A profile of the user's own is for one stage.
                    own = job.parallel.ds_config if zero == job.parallel.zero else ""
                    parallel = ParallelSection(tp=tp, pp=pp, zero=zero, sequence_parallel=tp > 1, ds_config=own)
                    yield replace(job, run=replace(job.run, parallel=parallel))


def fitting(job: Job, flops_per_second: float, device_bytes: float) -> list[Plan]:
    """The layouts of as many processes that fit into a device, the fastest first (then those with most to spare)."""
    fit = (one for one in candidates(job) if refusal(one) is None and on_device(memory(one)) <= device_bytes)
    plans = [plan(one, flops_per_second) for one in fit]
    return sorted(plans, key=lambda found: (round(found.seconds, 3), found.memory))


def smallest(job: Job, flops_per_second: float, device_bytes: float, most: int = 4096) -> Plan | None:
    """The fastest layout on the fewest devices (a power of two) that hold the run; None if `most` do not."""
    for world in _powers(most):
        found = fitting(replace(job, world=world), flops_per_second, device_bytes)
        if found:
            return found[0]
    return None


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
