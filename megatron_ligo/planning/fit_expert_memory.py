"""Counts what the experts of a fit keep: the tensors of a step, and a token's activations.

Legend: t tokens of a micro-batch; k experts of a token; D, D1: hidden sizes of the large and the small model; F, S:
widths of an expert and of a shared one; E1, E2: experts of the two; G shards; m neurons of an expert that start anew.

    products of a layer     E1 3 G F D1 / tp, and a router of E2 D1 that is grown
    sums of small experts   E2 / ep x 3 F D1 / tp for each micro-batch, if E1 > 1
    activations             t a (2 D + k (7 F / tp + 2 D1) + 6 E2): the norm's output and what precedes its gain; by
                            expert: input, both linears' outputs, before and after their weights, and three activations;
                            5 F and D1 if E1 > 1. Beside a shared expert 2 S / tp + D + 2 D1. With m > 0
                            k (D + 5 m / tp) more
"""

from __future__ import annotations

from megatron_ligo.arch.spec import ParamSpec, Role
from megatron_ligo.growth.experts import absent_block, num_shards
from megatron_ligo.models.factored.fit_flops import SCORES
from megatron_ligo.planning.planned_job import PlannedJob

# Of a router, in fp32 in any precision: logits, scores, weights, choices, and those of the load-balancing loss.
ROUTER_COPIES = 6
MATRICES = 3  # of an expert


def is_of_experts(param: ParamSpec) -> bool:
    """True for matrices that are counted here: not for a shared expert's linears, which are like a dense block's."""
    return param.in_expert or param.role in SCORES


def list_present(job: PlannedJob, params: list[ParamSpec]) -> list[ParamSpec]:
    """Returns the parameters without those of a block that writes nothing, which a fit does not compute."""
    absent = absent_block(job.operator.small, job.operator.settings)
    return [param for param in params if param.role not in absent]


def _has(job: PlannedJob, role: Role) -> bool:
    return any(param.role is role for param in list_present(job, job.operator.arch.layer_params(job.large)))


def count_products(job: PlannedJob) -> int:
    """Counts the elements of a layer's products with the maps, on a rank."""
    small, large, tp = job.operator.small, job.large, job.parallel.tp
    if not large.num_experts:
        return 0
    router = 0 if job.operator.draws_routers else large.num_experts * small.hidden_size
    if not _has(job, Role.EXPERT_DOWN):
        return router
    rows = num_shards(small, large) * large.ffn_size // tp
    return router + small.num_experts * MATRICES * rows * small.hidden_size


def count_sums(job: PlannedJob) -> int:
    """Counts the elements of the sums of small experts that a layer keeps for each micro-batch."""
    small, large, parallel = job.operator.small, job.large, job.parallel
    if small.num_experts <= 1:
        return 0
    return large.num_experts // parallel.ep * MATRICES * large.ffn_size // parallel.tp * small.hidden_size


def count_dropped(job: PlannedJob) -> int:
    """Counts the fixed weights, in fp32, of a layer's neurons that start anew."""
    neurons, large, parallel = _count_dropped_neurons(job), job.large, job.parallel
    weights = MATRICES * neurons * large.hidden_size + (large.ffn_size if neurons else 0)
    return large.num_experts // parallel.ep * weights // parallel.tp


def _count_dropped_neurons(job: PlannedJob) -> int:
    return round((job.operator.settings.expert_drop or 0) * job.large.ffn_size) if job.large.num_experts else 0


def count_activations(job: PlannedJob) -> float:
    """Counts the elements per token that a layer's block keeps for its backward pass, routers' in fp32."""
    small, large, tp = job.operator.small, job.large, job.parallel.tp
    stream = large.hidden_size / (tp if job.parallel.sequence_parallel else 1)
    elements = 2 * stream + ROUTER_COPIES * large.num_experts * 4 / job.element_bytes
    if _has(job, Role.EXPERT_DOWN):
        weighted = small.num_experts == 1
        routed = (7 if weighted else 5) * large.ffn_size / tp + (2 if weighted else 1) * small.hidden_size
        dropped = _count_dropped_neurons(job)
        routed += large.hidden_size + 5 * dropped / tp if dropped else 0
        elements += large.top_k * routed
    if _has(job, Role.SHARED_EXPERT_DOWN):
        elements += 2 * large.shared_expert_ffn_size / tp + stream + 2 * small.hidden_size
    return elements
