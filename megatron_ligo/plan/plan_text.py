"""A plan as a page of text."""

from __future__ import annotations

from math import prod

from megatron_ligo.growth.operator import Operator
from megatron_ligo.plan import layout_search, parameter_count
from megatron_ligo.plan.memory import memory
from megatron_ligo.plan.planned_job import BYTES, Job
from megatron_ligo.plan.traffic import traffic


def size(count: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2f} s"


def number(count: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,.0f}"


def models(operator: Operator) -> list[str]:
    counts = operator.num_parameters()
    lines = [
        f"small model      {number(parameter_count.model_total(operator.small))} parameters",
        f"large model      {number(parameter_count.model_total(operator.large))} parameters",
        f"operator         {number(sum(counts.values()))} learned numbers",
    ]
    return lines + [f"  {name:24s} {number(count)}" for name, count in counts.items() if not name.startswith("depth.")]


def run(title: str, job: Job, flops_per_second: float, device_bytes: float) -> list[str]:
    """One phase: what a rank holds and sends, how long it takes, the fewest devices that hold it."""
    reason = layout_search.refusal(job)
    if reason:
        return [f"{title}: refused: {reason}"]
    plan = layout_search.plan(job, flops_per_second)
    tokens = job.run.global_batch_size * job.seq_length
    besides = "libraries (0.4 GB on a CPU), pages of files that are read, what the allocator keeps"
    lines = [
        f"{title}: {plan.words}; {job.micro_batches} micro-batches of {job.tokens} tokens, {job.run.precision}"
        + (", recomputed" if job.run.recompute else ""),
        f"  tensors of the fullest rank  {size(plan.memory)}" + ("" if plan.memory <= device_bytes else "  TOO MUCH"),
        *(f"    {kind:26s} {size(count)}" for kind, count in memory(job).items() if count),
        f"    not counted                {besides}",
        f"  FLOPs of a step              {number(job.flops())} ({number(job.flops() / tokens)} a token)",
        f"  a step                       {duration(plan.seconds)}, bubble {plan.bubble:.0%}",
        f"  {job.run.steps} steps{'':22s} {duration(plan.seconds * job.run.steps)}",
        "  a rank sends in a step",
        *(f"    {kind:26s} {size(count)}" for kind, count in traffic(job).items() if count),
    ]
    few = layout_search.smallest(job, flops_per_second, device_bytes)
    found = f"{few.job.world}: {few.words}, {size(few.memory)}" if few else "more than 4096"
    return [*lines, f"  fewest devices of {size(device_bytes)}    {found}"]


def refused(title: str, job: Job) -> list[str]:
    """The layouts of as many processes that cannot be, with the reasons, one line a reason."""
    reasons: dict[str, list[str]] = {}
    for one in layout_search.candidates(job):
        reason = layout_search.refusal(one)
        if reason:
            parallel = one.parallel
            reasons.setdefault(reason, []).append(f"{parallel.tp}x{parallel.pp} Z{parallel.zero}")
    return [f"{title}: refused layouts (tp x pp, ZeRO)", *(f"  {', '.join(ls)}: {r}" for r, ls in reasons.items())]


def growth(operator: Operator, formats: tuple[str, ...], dtype: str) -> list[str]:
    """Applying the operator: the work, what is written, and what is held while it streams."""
    small, large = operator.small, operator.large
    rows = [row for row in operator.arch.rows if row.stored(large)]
    largest = max(prod(row.shape(large)) for row in rows)
    written = parameter_count.model_total(large) * BYTES[dtype] * len(formats)
    flops = 0
    for row in rows:
        if len(row.axes) == 2:
            times = large.num_layers if row.in_layer else 1
            (n, m), (a, b) = row.shape(large), row.shape(small)
            flops += 2 * times * (n * a * b + n * b * m)
    return [
        "growth",
        f"  FLOPs                        at most {number(flops)}",
        f"  written ({', '.join(formats)})     {size(written)}",
        f"  held while it streams        about {size(4 * 4 * largest)} (the largest tensor, its sources, what waits)",
    ]


def checkpoints(operator: Operator, large_dtype: str) -> list[str]:
    total = parameter_count.model_total(operator.large)
    dense = sum(prod(shape) for name, shape in operator.shapes().items() if not name.startswith("gain"))
    learned = sum(operator.num_parameters().values())
    return [
        "checkpoints",
        f"  operator                     {size(4 * dense)}",
        f"  of the fit (to resume)       {size(16 * learned)}",
        f"  of the pretraining           {size((12 + BYTES[large_dtype]) * total)}",
    ]
