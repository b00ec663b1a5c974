"""Bytes that one rank sends in a step, by kind, as rings send them: an all-reduce of n bytes over r ranks is
2 n (r - 1) / r, a gather or a scatter of n bytes in all half of that."""

from __future__ import annotations

from megatron_ligo.plan import parameter_count
from megatron_ligo.plan.planned_job import DTYPE_BYTES, PlannedJob


def count_ring_elements(numbers: float, ranks: int, passes: int = 2) -> float:
    return passes * numbers * (ranks - 1) / ranks


def estimate_traffic(job: PlannedJob) -> dict[str, int]:
    """The busiest stage's rank: tensor parallelism, mixing of the small model, pipeline, data parallelism."""
    found = [_estimate_stage_traffic(job, stage) for stage in range(job.parallel.pp)]
    return max(found, key=lambda kinds: sum(kinds.values()))


def _estimate_stage_traffic(job: PlannedJob, stage: int) -> dict[str, int]:
    tp, pp, dp, zero = job.parallel.tp, job.parallel.pp, job.dp, job.parallel.zero
    large, operator = job.large, job.operator
    layers = job.layers_per_stage()[stage]
    stream = large.hidden_size if operator is None else operator.small.hidden_size
    # Each layer has two crossings forward and two backward; the embedding has one, the head one backward.
    crossings = 4 * layers + (stage == 0) + (stage == pp - 1)
    passes = 3 if job.run.recompute else 2
    crossings += (passes - 2) * 2 * layers
    kinds = {
        "tensor parallel": count_ring_elements(crossings * job.micro_batch_tokens * stream, tp)
        * job.element_bytes
        * job.micro_batches
    }
    hops = (stage > 0) + (stage < pp - 1)
    inside = tp if job.parallel.sequence_parallel else 1
    kinds["pipeline"] = (
        hops * job.micro_batch_tokens * large.hidden_size // inside * job.element_bytes * job.micro_batches
    )
    if operator is None:
        learned = parameter_count.count_model_on_rank(job, stage)
        gradient = DTYPE_BYTES[job.run.precision]
    else:
        learned, gradient = parameter_count.count_operator_on_rank(operator, tp, layers), 4
        mixed = 0 if job.whole_source else layers * parameter_count.count_layer(operator.small, 1)
        group = tp * dp if zero == 3 else tp
        steps = job.micro_batches if zero == 3 else 1
        kinds["mixing"] = count_ring_elements(mixed, group) * job.element_bytes * steps
    # ZeRO 1 and 2 reduce gradients and gather weights; ZeRO 3 gathers them for the forward and the backward pass.
    rounds = 3 * job.micro_batches if zero == 3 else 2
    kinds["data parallel"] = count_ring_elements(learned, dp, 1) * gradient * rounds
    return {kind: round(count) for kind, count in kinds.items()}
