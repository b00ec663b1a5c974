"""Estimates the bytes of a rank's tensors, by kind, at the peak of a step.

The estimate corresponds to `torch.cuda.max_memory_allocated`. A process also holds the libraries (0.4 GB on a CPU), the
device context, and freed memory that the allocator caches.

Counted terms. L: layers of a stage; t: tokens of a micro-batch; D, F: hidden and ffn sizes; H, G, d: heads, KV heads,
head size; D1, F1: the small model's sizes; V: vocabulary; a: bytes of an activation:

    activations of a layer  t a (4 D + ((4 H + 3 G) d + 5 F) / tp); 2 F instead of 5 F without a gate. Inputs and
                            outputs of both norms; q, k, v before and after rotation; attention's output and its copy;
                            outputs of the ffn's first linear and of its activation
    the same in a fit       t a (2 D + ((3 H + 3 G) d + 2 F) / tp); F instead of 2 F without a gate. Norms, activations
                            and copies are recomputed, one linear at a time. Plus 4 D1, plus 3 F1 where the ffn's maps
                            are applied as factors. With full recomputation, all terms of the first row
    with cp > 1             t is the rank's part of the tokens, and of the heads stay (3 H + 2 G') d: q, k, v after the
                            all-to-all, attention's output and what the second all-to-all returns. G': KV heads, copies
                            for the ranks included
    in a pipeline           stage i of pp holds the activations of min(micro-batches, pp - i) micro-batches
    experts instead of F    t a (k (5 F / tp + 2 D) + 3 E + 5 S / tp), k of E experts, S of a shared one; 2 D more for
                            each further expert-parallel rank, whose tokens are gathered. In a fit:
                            fit_expert_memory.py
    logits                  t V / tp in fp32: LOGIT_COPIES, plus PIPELINE_LOGIT_COPIES in a pipeline; in bf16 runs, one
                            more copy in bf16
    with recomputation      t a D per layer and micro-batch, plus one whole layer or the logits, whichever is larger
    buckets of gradients    whole, two of them where reductions overlap; beside the activations, but in a fit at ZeRO 1
                            and 2 and in a pipeline
    at ZeRO 2 and 3         the largest parameter's gradient before it is reduced; at ZeRO 2, with several
                            micro-batches, the shard of one beside the sums
"""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.spec import ParamSpec, Use
from megatron_ligo.models.factored.fit_flops import MapUse, is_factored
from megatron_ligo.planning import fit_expert_memory, optimizer_memory, parameter_count
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.sharding.tensor_parallel import padded_vocab

# fp32 copies of the logits (the loss works in place), and the further copies that DeepSpeed's pipeline keeps.
LOGIT_COPIES, PIPELINE_LOGIT_COPIES = 1, 2
# Further copies for distillation: the teacher's logits; log-probabilities and probabilities of both models; their
# difference and its product.
DISTILLATION_COPIES = 7
MIXED_LAYERS_AT_ONCE = 8
# Of a routed token: its input and output by expert; of a router: scores, weights and choices.
ROUTED_COPIES, ROUTER_COPIES = 2, 3
# Suffix of the kinds that lie in host memory.
ON_HOST_SUFFIX = ", on the host"


def estimate_peak_memory(job: PlannedJob) -> dict[str, int]:
    """Returns the bytes by kind of the rank whose device holds most."""
    stages = (estimate_stage_memory(job, stage) for stage in range(job.parallel.pp))
    return max(stages, key=sum_device_bytes)


def sum_device_bytes(kinds: dict[str, int]) -> int:
    """Sums the bytes by kind without those on the host."""
    return sum(count for kind, count in kinds.items() if not kind.endswith(ON_HOST_SUFFIX))


def estimate_stage_memory(job: PlannedJob, stage: int) -> dict[str, int]:
    """Returns the bytes by kind of a rank of a stage. Offloaded kinds end with ON_HOST_SUFFIX."""
    kinds = _estimate_trained_state(job, stage)
    if job.operator is not None:
        kinds |= _estimate_small_model(job, stage)
    if job.distilled:
        kinds["teacher"] = _estimate_teacher(job)
    if job.lagged:
        kinds["lag"] = job.element_bytes * parameter_count.count_model_on_rank(job, stage)
    kinds["activations"] = _estimate_activations(job, stage)
    if job.operator is not None and job.micro_batches_per_build == 1:
        peak = _estimate_build_peak(job, stage)
        kinds["gradient sums"] = max(0, peak - kinds["mixed"] - kinds["activations"])
    update, buckets = kinds.pop("update"), kinds.pop("buckets")
    if _reduces_beside_activations(job):
        kinds["buckets"] = buckets
        kinds["buffers"] = max(0, update - kinds["activations"])
    else:
        # The optimizer allocates them after the activations are freed.
        kinds["buffers"] = max(0, max(update, buckets) - kinds["activations"])
    return {kind: round(count) for kind, count in kinds.items()}


def _estimate_trained_state(job: PlannedJob, stage: int) -> dict[str, float]:
    """Estimates weights, gradients and optimizer state of the trained parameters, and the buffers of their update."""
    zero = job.parallel.zero
    if job.operator is None:
        count, width, name = parameter_count.count_model_on_rank(job, stage), job.element_bytes, "weights"
    else:
        layers = job.layers_per_stage()[stage]
        count, width, name = (
            parameter_count.count_operator_on_rank(job.operator, job.parallel.tp, layers),
            4,
            "operator",
        )
    bf16_weights = job.operator is None and job.training.precision == "bf16"
    optimizer = optimizer_memory.read_optimizer_memory(job.parallel, bf16_weights)
    shard = count / job.replicas
    weights = ON_HOST_SUFFIX if optimizer.offloads_weights else ""
    adam = ON_HOST_SUFFIX if optimizer.offloads_optimizer else ""
    # An offloaded optimizer also holds the gradients.
    masters = optimizer.master_bytes * (2 if optimizer.offloads_optimizer else 1)
    copied = _copies_gradients(job, width < optimizer.master_bytes)
    return {
        name + weights: width * (shard if zero == 3 else count),
        "gathered": width * min(count, optimizer.live_parameters) if zero == 3 else 0,
        "gradients": optimizer_memory.gradient_bytes(job.parallel, width) * (shard if zero > 1 else count)
        + _estimate_unreduced(job, width, shard),
        "optimizer" + adam: (masters + 2 * optimizer.moment_bytes) * shard,
        "update": copied * optimizer.master_bytes * shard,
        "buckets": optimizer_memory.bucket_bytes(job.parallel, width, round(count)),
    }


def _estimate_unreduced(job: PlannedJob, width: int, shard: float) -> float:
    """Estimates the gradients of a micro-batch that stand beside their sums over the micro-batches, under ZeRO 2 and 3.

    ZeRO 2 collects a rank's shard before it is added; both keep the whole gradient of a parameter until it is reduced.
    """
    if job.parallel.zero < 2 or job.operator is not None:
        return 0
    collected = shard if job.parallel.zero == 2 and job.micro_batches > 1 else 0
    return width * (collected + parameter_count.count_largest(job.large, job.parallel.tp))


def _reduces_beside_activations(job: PlannedJob) -> bool:
    """Tells whether buckets of gradients stand beside the activations: a fit's maps get their gradients last."""
    return job.parallel.zero == 3 or (job.operator is None and job.parallel.pp == 1)


def _copies_gradients(job: PlannedJob, is_mixed_precision: bool) -> bool:
    """Tells whether the optimizer gets a copy of the gradients: unless they are whole and in the optimizer's dtype."""
    return is_mixed_precision or job.parallel.zero > 1 or job.parallel.pp > 1


def _estimate_small_model(job: PlannedJob, stage: int) -> dict[str, float]:
    """Estimates the small model's shard and a step's tensors derived from it: mixed weights, products, gradients."""
    operator, tp = job.operator, job.parallel.tp
    small, layers = operator.small, job.layers_per_stage()[stage]
    ranks = _count_mixing_ranks(job)
    first, last = stage == 0, stage == job.parallel.pp - 1
    layer = parameter_count.count_layer(small, 1)
    table = padded_vocab(job.large.vocab_size, tp) // tp * small.hidden_size
    tables = (first or (last and small.tied)) + (last and not small.tied)
    maps = parameter_count.count_operator_on_rank(operator, tp, layers)
    sums = 0
    if job.micro_batches_per_build > 1:
        sums = 4 * (layers * _count_linear_weights(job) + maps)
    copies = job.element_bytes * maps if job.element_bytes < 4 else 0
    dropped = {"dropped neurons": 4 * layers * fit_expert_memory.count_dropped(job)} if small.num_experts else {}
    return dropped | {
        "source": small.num_layers * layer * job.source_bytes / ranks + 4 * table * tables,
        "maps": copies,
        "mixed": job.element_bytes * (layers * (layer + _count_layer_products(job))),
        "gradient sums": sums,
    }


def _count_mixing_ranks(job: PlannedJob) -> int:
    """Counts the ranks that share the mixing of the small weights."""
    tp = job.parallel.tp
    return 1 if job.whole_source else tp * job.replicas if job.parallel.zero == 3 else tp


def _estimate_build_peak(job: PlannedJob, stage: int) -> float:
    """Estimates the largest sum of mixed weights, products, their gradients and activations while a batch is built.

    Layers are built, and their builds taken back, in batches. Live with a batch of b layers after s others:

        mixing it          s (m + p + a) + b m and the room of the mixing
        before its build   (s + b) (m + p) + s a, the gradients of what its linears receive, and a layer recomputed
        behind its build   s (m + p + a), and the gradients of its mixed weights, beside their copies for other ranks

    m, p, a: bytes of a layer's mixed weights, products and kept activations. The last two beside the gradients of the
    maps, which are summed over the layers in the run's dtype.
    """
    small, width, ranks = job.operator.small, job.element_bytes, _count_mixing_ranks(job)
    layers = job.layers_per_stage()[stage]
    mixed, products = width * parameter_count.count_layer(small, 1), width * _count_layer_products(job)
    received, kept = width * _count_linear_weights(job), _estimate_kept_by_layer(job)
    recomputed = _estimate_layer_activations(job) if job.training.recompute else kept
    # One matrix at a time is mixed and differentiated in fp32.
    largest = max(prod(spec.shape(small)) for spec in _list_layer_matrices(job)) * 4 / ranks if width < 4 else 0
    gathered = mixed * (1 + 1 / ranks) if ranks > 1 else 2 * largest
    copied = mixed if ranks > 1 else largest
    sums = width * parameter_count.count_operator_on_rank(job.operator, job.parallel.tp, layers)
    peak = 0.0
    for first in range(0, layers, MIXED_LAYERS_AT_ONCE):
        count = min(MIXED_LAYERS_AT_ONCE, layers - first)
        before = first * (mixed + products + kept)
        mixing = before + count * (mixed + gathered)
        linears = before + count * (mixed + products + received) + recomputed
        peak = max(peak, mixing, linears + sums, before + count * (mixed + copied) + sums)
    return peak


def _estimate_teacher(job: PlannedJob) -> float:
    """Estimates the small model as a teacher, and the buffers of the distillation loss besides the logits."""
    small, tp = job.operator.small, job.parallel.tp
    outside = parameter_count.count_outside_layers(small, tp, True, True)
    elements = small.num_layers * parameter_count.count_layer(small, tp) + outside
    logits = DISTILLATION_COPIES * 4 * job.micro_batch_tokens * padded_vocab(small.vocab_size, tp) / tp
    return job.element_bytes * elements + logits


def _applies_factors(job: PlannedJob, spec: ParamSpec) -> bool:
    """Tells whether a rank applies a linear's map and weight as factors, by the rule of the factored linears."""
    operator, tp = job.operator, job.parallel.tp
    inner = 0 if spec.tp_dim == 0 else 1
    lift = operator.space_maps.lift(spec.axes[inner])
    width_map = operator.maps[lift.map_name]
    shape = (width_map.large // tp, width_map.small)
    cost = MapUse(operator, lift.map_name, spec.axes[inner].use is Use.INPUT, tp).cost
    tokens = job.micro_batches_per_build * job.micro_batch_tokens
    return is_factored(spec, lift, tokens, shape, operator.small.hidden_size, cost)


def _list_layer_matrices(job: PlannedJob) -> list[ParamSpec]:
    matrices = [spec for spec in job.operator.arch.layer_params(job.large) if len(spec.axes) == 2]
    if not job.large.num_experts:
        return matrices
    present = fit_expert_memory.list_present(job, matrices)
    return [spec for spec in present if not fit_expert_memory.is_of_experts(spec)]


def _count_product(job: PlannedJob, spec: ParamSpec) -> int:
    """Counts the elements of a weight grown along its inner axis only: (large / tp, small)."""
    inner = spec.tp_dim
    return spec.shape(job.large)[inner] // job.parallel.tp * spec.shape(job.operator.small)[1 - inner]


def _count_layer_products(job: PlannedJob) -> int:
    """Counts the elements of a layer's materialised products."""
    products = [_count_product(job, spec) for spec in _list_layer_matrices(job) if not _applies_factors(job, spec)]
    return sum(products) + fit_expert_memory.count_products(job)


def _count_linear_weights(job: PlannedJob) -> int:
    """Counts the elements that a layer's linears receive as weights: products, or mixed small weights if factored."""
    small = job.operator.small
    weights = [
        prod(spec.shape(small)) if _applies_factors(job, spec) else _count_product(job, spec)
        for spec in _list_layer_matrices(job)
    ]
    return sum(weights) + fit_expert_memory.count_products(job)


def _estimate_activations(job: PlannedJob, stage: int) -> float:
    layers = job.layers_per_stage()[stage]
    parallel, last = job.parallel, stage == job.parallel.pp - 1
    in_flight = min(job.micro_batches, parallel.pp - stage)
    whole, kept = _estimate_layer_activations(job), _estimate_kept_by_layer(job)
    vocab = padded_vocab(job.large.vocab_size, parallel.tp) // parallel.tp
    copies = LOGIT_COPIES + (PIPELINE_LOGIT_COPIES if parallel.pp > 1 else 0)
    low_precision = job.element_bytes if job.element_bytes < 4 else 0
    logits = (copies * 4 + low_precision) * job.micro_batch_tokens * vocab if last else 0
    if last and job.operator is not None:
        # The head's table in the run's dtype.
        logits += low_precision * vocab * job.operator.small.hidden_size
    if job.training.recompute:
        # The logits are freed before a layer is recomputed.
        return layers * kept * in_flight + max(whole, logits)
    return layers * kept * in_flight + logits


def _estimate_layer_activations(job: PlannedJob) -> float:
    """Estimates the bytes that a layer computes for its backward pass with a micro-batch."""
    whole = _count_layer_activations(job) * job.element_bytes * job.micro_batch_tokens
    if job.operator is not None and job.large.num_experts:
        whole += fit_expert_memory.count_sums(job) * job.element_bytes
    return whole


def _estimate_kept_by_layer(job: PlannedJob) -> float:
    """Estimates the bytes that a layer keeps until its backward pass: its input only, if it is recomputed."""
    if not job.training.recompute:
        return _estimate_layer_activations(job)
    stream_parts = job.parallel.tp if job.parallel.sequence_parallel else 1
    return job.micro_batch_tokens * job.large.hidden_size * job.element_bytes / stream_parts


def _count_ffn_activations(job: PlannedJob) -> tuple[int, int]:
    """Returns the kept outputs of the ffn's first linear and of its activation, in units of the ffn size.

    Megatron-core adds a constant to the up projection and keeps the activated gate, that sum and their product. A fit
    adds none.
    """
    if architectures.get(job.large.arch).is_gated(job.large):
        return 2, 3 if job.operator is None else 2
    return 1, 1


def _count_layer_activations(job: PlannedJob) -> float:
    """Counts the elements per token that a layer keeps for its backward pass."""
    large, tp = job.large, job.parallel.tp
    stream_parts = tp if job.parallel.sequence_parallel else 1
    # What all-to-alls return takes the place of their inputs.
    exchanges = job.parallel.cp > 1
    queries, keys = (3, 2 * job.exchanged_kv_heads) if exchanges else (4, 3 * large.num_kv_heads)
    heads = (queries * large.num_heads + keys) * large.head_dim
    linear_outputs, activated = _count_ffn_activations(job)
    kept = linear_outputs + activated
    elements = 4 * large.hidden_size / stream_parts + (heads + kept * large.ffn_size) / tp
    if large.num_experts:
        block = fit_expert_memory.count_activations(job) if job.operator else _count_expert_activations(job, kept)
        elements += block - kept * large.ffn_size / tp
        # Only the ffn's own activations are recomputed by its linear.
        activated = 0
    if job.operator is None:
        return elements
    if not job.training.recompute:
        copied = 0 if exchanges else large.num_heads * large.head_dim
        elements -= 2 * large.hidden_size / stream_parts + (copied + activated * large.ffn_size) / tp
    small = job.operator.small
    factored = sum(_applies_factors(job, spec) for spec in _list_layer_matrices(job))
    # Of a shared expert as of an ffn.
    width = small.shared_expert_ffn_size if large.num_experts else small.ffn_size
    return elements + 4 * small.hidden_size + factored * width


def _count_expert_activations(job: PlannedJob, kept: int) -> float:
    """Counts the elements per token of a block of experts, if they get equal shares of the tokens.

    A token's input, and what its top_k experts return, before and after their weights; all ranks' tokens under expert
    parallelism; the router's scores, choices and weights. kept: outputs of the linears and activations, of each.
    """
    large, parallel = job.large, job.parallel
    routed = large.top_k * (kept * large.ffn_size / parallel.tp + ROUTED_COPIES * large.hidden_size)
    gathered = 2 * (parallel.ep - 1) * large.hidden_size if parallel.ep > 1 else 0
    return routed + gathered + ROUTER_COPIES * large.num_experts + kept * large.shared_expert_ffn_size / parallel.tp
