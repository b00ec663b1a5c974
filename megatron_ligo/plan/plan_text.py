"""A plan as a page of text."""

from __future__ import annotations

from math import prod

from megatron_ligo.growth.operator import Operator
from megatron_ligo.plan import layout_search, parameter_count
from megatron_ligo.plan.memory import estimate_peak_memory
from megatron_ligo.plan.planned_job import DTYPE_BYTES, PlannedJob
from megatron_ligo.plan.traffic import estimate_traffic


def format_bytes(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def format_duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2f} s"


def format_count(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,.0f}"


def describe_models(operator: Operator) -> list[str]:
    counts = operator.num_parameters()
    lines = [
        f"small model      {format_count(parameter_count.count_model(operator.small))} parameters",
        f"large model      {format_count(parameter_count.count_model(operator.large))} parameters",
        f"operator         {format_count(sum(counts.values()))} learned numbers",
    ]
    return lines + [
        f"  {name:24s} {format_count(count)}" for name, count in counts.items() if not name.startswith("depth.")
    ]


def describe_run(title: str, job: PlannedJob, flops_per_second: float, device_bytes: float) -> list[str]:
    """One phase: what a rank holds and sends, how long it takes, the fewest devices that hold it."""
    reason = layout_search.find_refusal(job)
    if reason:
        return [f"{title}: refused: {reason}"]
    plan = layout_search.plan_layout(job, flops_per_second)
    tokens = job.run.global_batch_size * job.seq_length
    flops = job.step_flops()
    besides = "libraries (0.4 GB on a CPU), pages of files that are read, what the allocator keeps"
    lines = [
        f"{title}: {plan.description}; {job.micro_batches} micro-batches of {job.micro_batch_tokens} tokens, "
        f"{job.run.precision}" + (", recomputed" if job.run.recompute else ""),
        f"  tensors of the fullest rank  {format_bytes(plan.memory_bytes)}"
        + ("" if plan.memory_bytes <= device_bytes else "  TOO MUCH"),
        *(f"    {kind:26s} {format_bytes(count)}" for kind, count in estimate_peak_memory(job).items() if count),
        f"    not counted                {besides}",
        f"  FLOPs of a step              {format_count(flops)} ({format_count(flops / tokens)} a token)",
        f"  a step                       {format_duration(plan.seconds)}, bubble {plan.bubble:.0%}",
        f"  {job.run.steps} steps{'':22s} {format_duration(plan.seconds * job.run.steps)}",
        "  a rank sends in a step",
        *(f"    {kind:26s} {format_bytes(count)}" for kind, count in estimate_traffic(job).items() if count),
    ]
    few = layout_search.find_smallest_layout(job, flops_per_second, device_bytes)
    found = f"{few.job.world}: {few.description}, {format_bytes(few.memory_bytes)}" if few else "more than 4096"
    return [*lines, f"  fewest devices of {format_bytes(device_bytes)}    {found}"]


def describe_refused_layouts(title: str, job: PlannedJob) -> list[str]:
    """The layouts of as many processes that cannot be, with the reasons, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for one in layout_search.iterate_layouts(job):
        reason = layout_search.find_refusal(one)
        if reason:
            parallel = one.parallel
            reasons.setdefault(reason, []).append(f"{parallel.tp}x{parallel.pp} Z{parallel.zero}")
    return [f"{title}: refused layouts (tp x pp, ZeRO)", *(f"  {', '.join(ls)}: {r}" for r, ls in reasons.items())]


def describe_growth(operator: Operator, formats: tuple[str, ...], dtype: str) -> list[str]:
    """Applying the operator: the work, what is written, and what is held while it streams."""
    small, large = operator.small, operator.large
    rows = [row for row in operator.arch.rows if row.stored(large)]
    largest = max(prod(row.shape(large)) for row in rows)
    written = parameter_count.count_model(large) * DTYPE_BYTES[dtype] * len(formats)
    flops = 0
    for row in rows:
        if len(row.axes) == 2:
            times = large.num_layers if row.in_layer else 1
            (n, m), (a, b) = row.shape(large), row.shape(small)
            flops += 2 * times * (n * a * b + n * b * m)
    return [
        "growth",
        f"  FLOPs                        at most {format_count(flops)}",
        f"  written ({', '.join(formats)})     {format_bytes(written)}",
        f"  held while it streams        about {format_bytes(4 * 4 * largest)} "
        "(the largest tensor, its sources, what waits)",
    ]


def describe_checkpoints(operator: Operator, large_dtype: str) -> list[str]:
    total = parameter_count.count_model(operator.large)
    dense = sum(prod(shape) for name, shape in operator.shapes().items() if not name.startswith("gain"))
    learned = sum(operator.num_parameters().values())
    return [
        "checkpoints",
        f"  operator                     {format_bytes(4 * dense)}",
        f"  of the fit (to resume)       {format_bytes(16 * learned)}",
        f"  of the pretraining           {format_bytes((12 + DTYPE_BYTES[large_dtype]) * total)}",
    ]
