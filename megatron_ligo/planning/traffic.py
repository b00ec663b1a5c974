"""Estimates the bytes that one rank sends per step, by kind, under ring collectives.

An all-reduce of n bytes over r ranks sends 2 n (r - 1) / r per rank, an all-gather or reduce-scatter half of that.
"""

from __future__ import annotations

from megatron_ligo.arch.spec import Role
from megatron_ligo.growth.experts import absent_block
from megatron_ligo.planning import optimizer_memory, parameter_count
from megatron_ligo.planning.planned_job import DTYPE_BYTES, PlannedJob

# Bytes that a device sends per second, to devices of its node and of others: 8 GPUs with NVLink, one 400 Gb/s adapter
# each. Assumed, not measured.
NODE_SPEED, NETWORK_SPEED = 300e9, 40e9
DEVICES_PER_NODE = 8
# Tensor-parallel ranks are neighbours.
WITHIN_NODE = ("tensor parallel", "mixing")


def estimate_traffic_seconds(job: PlannedJob) -> float:
    """Estimates how long a rank of the busiest stage sends per step; none of it is hidden behind computation."""
    one_node = job.world_size <= DEVICES_PER_NODE
    near = WITHIN_NODE if job.parallel.zero < 3 else ()
    if job.parallel.tp * job.parallel.cp <= DEVICES_PER_NODE:
        near = (*near, "context parallel")
    return sum(
        count / (NODE_SPEED if one_node or kind in near else NETWORK_SPEED)
        for kind, count in estimate_traffic(job).items()
    )


def count_ring_elements(elements: float, ranks: int, passes: int = 2) -> float:
    """Returns the elements that a rank sends. passes: 2 for an all-reduce, 1 for an all-gather or reduce-scatter."""
    return passes * elements * (ranks - 1) / ranks


def estimate_traffic(job: PlannedJob) -> dict[str, int]:
    """Returns the bytes that a rank of the busiest stage sends per step, by kind."""
    stages = [_estimate_stage_traffic(job, stage) for stage in range(job.parallel.pp)]
    return max(stages, key=lambda kinds: sum(kinds.values()))


def _estimate_stage_traffic(job: PlannedJob, stage: int) -> dict[str, int]:
    tp, pp, zero = job.parallel.tp, job.parallel.pp, job.parallel.zero
    large, operator = job.large, job.operator
    layers = job.layers_per_stage()[stage]
    hidden_size = large.hidden_size if operator is None else operator.small.hidden_size
    # A layer has two all-reduces forward and two backward, the embedding one forward, the head one backward.
    all_reduces = 4 * layers + (stage == 0) + (stage == pp - 1)
    if job.training.recompute:
        all_reduces += 2 * layers
    stream = count_ring_elements(all_reduces * job.micro_batch_tokens * hidden_size, tp)
    kinds = {"tensor parallel": stream * job.element_bytes * job.micro_batches}
    neighbours = (stage > 0) + (stage < pp - 1)
    stream_parts = tp if job.parallel.sequence_parallel else 1
    boundary = neighbours * job.micro_batch_tokens * large.hidden_size // stream_parts
    kinds["pipeline"] = boundary * job.element_bytes * job.micro_batches
    kinds["context parallel"] = layers * _count_exchanged(job) * job.element_bytes * job.micro_batches
    kinds["expert parallel"] = _count_expert_traffic(job, stage)
    if operator is None:
        trained = parameter_count.count_model_on_rank(job, stage)
        weight_bytes = DTYPE_BYTES[job.training.precision]
        gradient_bytes = optimizer_memory.gradient_bytes(job.parallel, weight_bytes)
    else:
        trained, gradient_bytes = parameter_count.count_operator_on_rank(operator, tp, layers), 4
        weight_bytes = 4
        mixed = 0 if job.whole_source else layers * parameter_count.count_layer(operator.small, 1)
        group = tp * job.replicas if zero == 3 else tp
        gathers = job.micro_batches if zero == 3 else 1
        kinds["mixing"] = count_ring_elements(mixed, group) * job.element_bytes * gathers
    # ZeRO 1 and 2 reduce gradients and gather weights; ZeRO 3 also gathers weights for the forward and backward pass.
    reductions, gathers = (job.micro_batches, 2 * job.micro_batches) if zero == 3 else (1, 1)
    bytes_per_element = gradient_bytes * reductions + weight_bytes * gathers
    kinds["data parallel"] = count_ring_elements(trained, job.replicas, 1) * bytes_per_element
    return {kind: round(count) for kind, count in kinds.items()}


def _count_expert_traffic(job: PlannedJob, stage: int) -> float:
    """Counts the bytes that a rank sends to its expert-parallel ranks, as Megatron-core's dispatcher `alltoall` does.

    Each layer sends a token to each of its experts and back, in the backward pass the reverse. The gradients of all but
    experts are summed over these ranks before the engine reduces them. In a fit tokens have the small model's width
    (and the large one's, where neurons start anew), and the engine reduces all gradients.
    """
    ep, large, operator = job.parallel.ep, job.large, job.operator
    if ep == 1 or (operator is not None and Role.EXPERT_DOWN in absent_block(operator.small, operator.settings)):
        return 0
    width = large.hidden_size
    if operator is not None:
        width = operator.small.hidden_size + (width if operator.settings.expert_drop else 0)
    passes = 6 if job.training.recompute else 4
    tokens = job.micro_batch_tokens / (job.parallel.tp if job.parallel.sequence_parallel else 1)
    layers = job.layers_per_stage()[stage]
    sent = passes * layers * (ep - 1) / ep * large.top_k * tokens * width * job.element_bytes
    if operator is not None:
        return sent * job.micro_batches
    experts = layers * large.num_experts // ep * parameter_count.count_expert(large, job.parallel.tp)
    replicated = parameter_count.count_model_on_rank(job, stage) - experts
    gradients = count_ring_elements(replicated, ep) * DTYPE_BYTES[job.training.precision]
    return (sent + gradients) * job.micro_batches


def _count_exchanged(job: PlannedJob) -> float:
    """Counts the elements that a rank sends in the all-to-alls of a layer and micro-batch: of queries, keys, values and
    outputs, forward and backward."""
    large, cp = job.large, job.parallel.cp
    heads = (2 * large.num_heads / job.parallel.tp + 2 * job.exchanged_kv_heads / job.parallel.tp) * large.head_dim
    passes = 3 if job.training.recompute else 2
    return passes * job.micro_batch_tokens * heads * (cp - 1) / cp
