"""Bytes of a rank's tensors, by kind, at the moment of a step when it holds most.

It is what `torch.cuda.max_memory_allocated` counts. A process holds more: the libraries (0.4 GB on a CPU), a device's
context, and what the allocator keeps of tensors that are gone.

What is counted, with L a stage's layers, t the tokens of a micro-batch, D, F the hidden and ffn sizes, H, G, d heads,
KV heads and head size, a the bytes of an activation:

    a layer's activations   t a (4 D + ((4 H + 3 G) d + 5 F) / tp), 2 F where the ffn is not gated: both norms' inputs
                            and outputs; q, k, v before and after the rotation, attention's result and its copy; what
                            the ffn's first linear gives and what is made of it
    a fit's                 t a (2 D + ((3 H + 3 G) d + 2 F) / tp), the F of an ffn that is not gated once: norms,
                            activations and copies are made again, of one linear at a time. Besides 4 D1, and 3 F1
                            where the ffn's maps are applied factor by factor. Recomputed, a layer's are all of these
    in a pipeline           stage i of pp holds min(micro-batches, pp - i) micro-batches of them
    logits                  t V / tp in fp32, LOGITS times, in a pipeline KEPT times more; once more in bf16, if it is
    recomputed              t a D a layer and micro-batch, and one layer's whole or the logits
"""

from __future__ import annotations

from math import prod

from megatron_ligo import arch as architectures
from megatron_ligo.arch.spec import ParamSpec, Use
from megatron_ligo.growth.fit_flops import MapUse, is_factored
from megatron_ligo.plan import optimizer_memory, parameter_count
from megatron_ligo.plan.planned_job import PlannedJob
from megatron_ligo.sharding.tensor_parallel import padded_vocab

# fp32 copies of the logits (the loss works in place) and those that DeepSpeed's pipeline keeps of a stage's results.
LOGIT_COPIES, PIPELINE_LOGIT_COPIES = 1, 2
# The same of a teacher: its logits and, of both, logarithms and exponentials; their difference and its product.
DISTILLATION_COPIES = 7
MIXED_LAYERS_AT_ONCE = 8
# Ends the name of a kind that does not lie on the device.
ON_HOST_SUFFIX = ", on the host"


def estimate_peak_memory(job: PlannedJob) -> dict[str, int]:
    """Of the rank whose device holds most."""
    return max((estimate_stage_memory(job, number) for number in range(job.parallel.pp)), key=sum_device_bytes)


def sum_device_bytes(kinds: dict[str, int]) -> int:
    return sum(count for kind, count in kinds.items() if not kind.endswith(ON_HOST_SUFFIX))


def estimate_stage_memory(job: PlannedJob, number: int) -> dict[str, int]:
    """Of a rank of one stage. Kinds that end with ON_HOST are offloaded."""
    kinds = _trained_state(job, number)
    if job.operator is not None:
        kinds |= _small_model(job, number)
    if job.distilled:
        kinds["teacher"] = _teacher(job)
    if job.lagged:
        kinds["lag"] = job.element_bytes * parameter_count.count_model_on_rank(job, number)
    kinds["activations"] = _activations(job, number)
    # Activations are gone when the optimizer's own buffers come.
    kinds["buffers"] = max(0, kinds.pop("update") - kinds["activations"])
    return {kind: round(count) for kind, count in kinds.items()}


def _trained_state(job: PlannedJob, number: int) -> dict[str, float]:
    """Weights, gradients, optimizer of what is learned; buffers while it is updated."""
    zero, dp = job.parallel.zero, job.dp
    if job.operator is None:
        count, width, name = parameter_count.count_model_on_rank(job, number), job.element_bytes, "weights"
    else:
        layers = job.layers_per_stage()[number]
        count, width, name = (
            parameter_count.count_operator_on_rank(job.operator, job.parallel.tp, layers),
            4,
            "operator",
        )
    kept = optimizer_memory.read_optimizer_memory(
        job.parallel, bf16=job.operator is None and job.run.precision == "bf16"
    )
    part = count / dp
    bucket, gathered = width * min(count, kept.bucket), width * min(count, kept.live) if zero == 3 else 0
    weights, adam = ON_HOST_SUFFIX * kept.weights_on_host, ON_HOST_SUFFIX * kept.optimizer_on_host
    return {
        name + weights: width * (part if zero == 3 else count),
        "gathered": gathered,
        "gradients": width * (part if zero > 1 else count),
        # Offloaded, it has the gradients beside it.
        "optimizer" + adam: (kept.master * (2 if adam else 1) + 2 * kept.moment) * part,
        "update": _copies_gradients(job, width < kept.master) * kept.master * part + (2 if zero > 1 else 1) * bucket,
    }


def _copies_gradients(job: PlannedJob, narrow: bool) -> bool:
    """Whether the optimizer is given a copy of the gradients: all but those of its own width that stay whole."""
    return narrow or job.parallel.zero > 1 or job.parallel.pp > 1


def _small_model(job: PlannedJob, number: int) -> dict[str, float]:
    """The small model's part, and what a step makes of it: mixed rows, products with the maps, sums of gradients."""
    operator, tp = job.operator, job.parallel.tp
    small, layers = operator.small, job.layers_per_stage()[number]
    group = 1 if job.whole_source else tp * job.dp if job.parallel.zero == 3 else tp
    first, last = number == 0, number == job.parallel.pp - 1
    rows = parameter_count.count_layer(small, 1)
    table = padded_vocab(job.large.vocab_size, tp) // tp * small.hidden_size
    tables = (first or (last and small.tied)) + (last and not small.tied)
    used = layers * _linear_input_elements(job)
    maps = parameter_count.count_operator_on_rank(operator, tp, layers)
    if job.micro_batches_per_build > 1:
        sums = 4 * (used + maps)
    else:
        sums = 4 * 2 * min(layers, MIXED_LAYERS_AT_ONCE) * rows
    return {
        "source": small.num_layers * rows * job.source_bytes / group + 4 * table * tables,
        "mixed": job.element_bytes * (layers * (rows + _layer_product_elements(job))),
        "gradient sums": sums,
    }


def _teacher(job: PlannedJob) -> float:
    """The small model as it is trained on, and what its distribution over the next token takes beside the logits."""
    small, tp = job.operator.small, job.parallel.tp
    held = small.num_layers * parameter_count.count_layer(small, tp) + parameter_count.count_outside_layers(
        small, tp, True, True
    )
    return (
        job.element_bytes * held
        + DISTILLATION_COPIES * 4 * job.micro_batch_tokens * padded_vocab(small.vocab_size, tp) / tp
    )


def _is_factored(job: PlannedJob, row: ParamSpec) -> bool:
    """Whether a rank applies a row's map and weight one after the other (as the factored linears decide)."""
    operator, tp = job.operator, job.parallel.tp
    inner = 0 if row.split == 0 else 1
    lift = operator.frame.lift(row.axes[inner])
    spec = operator.maps[lift.map]
    cost = MapUse(operator, lift.map, row.axes[inner].use is Use.INPUT, tp).cost
    tokens = job.micro_batches_per_build * job.micro_batch_tokens
    return is_factored(row, lift, tokens, (spec.large // tp, spec.small), operator.small.hidden_size, cost)


def _layer_matrices(job: PlannedJob) -> list[ParamSpec]:
    return [row for row in job.operator.arch.layer_rows(job.large) if len(row.axes) == 2]


def _product_elements(job: PlannedJob, row: ParamSpec) -> int:
    """Numbers of a row grown on its inner axis only: (large / tp) x small."""
    inner = row.split
    return row.shape(job.large)[inner] // job.parallel.tp * row.shape(job.operator.small)[1 - inner]


def _layer_product_elements(job: PlannedJob) -> int:
    """Numbers that a layer's built products hold."""
    return sum(_product_elements(job, row) for row in _layer_matrices(job) if not _is_factored(job, row))


def _linear_input_elements(job: PlannedJob) -> int:
    """Numbers that a layer's linears are given: products, or mixed rows."""
    small = job.operator.small
    return sum(
        prod(row.shape(small)) if _is_factored(job, row) else _product_elements(job, row)
        for row in _layer_matrices(job)
    )


def _activations(job: PlannedJob, number: int) -> float:
    layers = job.layers_per_stage()[number]
    parallel, last = job.parallel, number == job.parallel.pp - 1
    at_once = min(job.micro_batches, parallel.pp - number)
    whole = _layer_activation_elements(job) * job.element_bytes * job.micro_batch_tokens
    vocab = padded_vocab(job.large.vocab_size, parallel.tp) // parallel.tp
    copies = LOGIT_COPIES + (PIPELINE_LOGIT_COPIES if parallel.pp > 1 else 0)
    narrow = job.element_bytes if job.element_bytes < 4 else 0
    logits = (copies * 4 + narrow) * job.micro_batch_tokens * vocab if last else 0
    if job.run.recompute:
        held = (
            job.micro_batch_tokens
            * job.large.hidden_size
            * job.element_bytes
            / (parallel.tp if parallel.sequence_parallel else 1)
        )
        # The logits are gone when a layer is computed again.
        return layers * held * at_once + max(whole, logits)
    return layers * whole * at_once + logits


def _ffn_activations(job: PlannedJob) -> tuple[int, int]:
    """What the ffn's first linear gives, and what its activation makes of it, in ffn sizes. (Megatron-core adds a
    constant to what is gated, and keeps the gate's activation, that sum and their product; a fit adds none.)"""
    if "layers.{}.gate" in architectures.get(job.large.arch).by_key:
        return 2, 3 if job.operator is None else 2
    return 1, 1


def _layer_activation_elements(job: PlannedJob) -> float:
    """Numbers that a layer keeps for its backward pass, of one token."""
    large, tp = job.large, job.parallel.tp
    stream = tp if job.parallel.sequence_parallel else 1
    heads = (4 * large.num_heads + 3 * large.num_kv_heads) * large.head_dim
    given, made = _ffn_activations(job)
    numbers = 4 * large.hidden_size / stream + (heads + (given + made) * large.ffn_size) / tp
    if job.operator is not None and not job.run.recompute:
        copied = large.num_heads * large.head_dim
        numbers -= 2 * large.hidden_size / stream + (copied + made * large.ffn_size) / tp
    if job.operator is None:
        return numbers
    small = job.operator.small
    factored = sum(_is_factored(job, row) for row in _layer_matrices(job))
    return numbers + 4 * small.hidden_size + factored * small.ffn_size
