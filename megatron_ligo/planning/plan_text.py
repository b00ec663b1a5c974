"""Formats a plan as text."""

from __future__ import annotations

from math import prod

from megatron_ligo.growth.operator import Operator
from megatron_ligo.planning import layout_search, parameter_count
from megatron_ligo.planning.memory import estimate_peak_memory
from megatron_ligo.planning.planned_job import DTYPE_BYTES, PlannedJob
from megatron_ligo.planning.traffic import DEVICES_PER_NODE, NETWORK_SPEED, NODE_SPEED, estimate_traffic
from megatron_ligo.training.job_summary import describe_operator


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
    """Lists the parameters of both models and of the operator's maps."""
    return [
        f"small model      {format_count(parameter_count.count_model(operator.small))} parameters",
        f"large model      {format_count(parameter_count.count_model(operator.large))} parameters"
        + (
            f", {format_count(parameter_count.count_active(operator.large))} of them for a token"
            if operator.large.num_experts
            else ""
        ),
        *describe_operator(operator.count_parameters()).splitlines(),
    ]


def describe_run(title: str, job: PlannedJob, flops_per_second: float, device_bytes: float) -> list[str]:
    """Describes a job: memory by kind, FLOPs, time, traffic, and the fewest devices that hold it."""
    problems = layout_search.find_problems(job)
    if problems:
        return [f"{title}: invalid layout: {' '.join(problems)}"]
    plan = layout_search.plan_layout(job, flops_per_second)
    flops, tokens = job.step_flops(), job.training.global_batch_size * job.seq_length
    recompute = ", recomputation" if job.training.recompute else ""
    traffic = {kind: count for kind, count in estimate_traffic(job).items() if count}
    too_large = "" if plan.memory_bytes <= device_bytes else "  EXCEEDS THE DEVICE"
    smallest = layout_search.find_smallest_layout(job, flops_per_second, device_bytes)
    return [
        f"{title}: {plan.description}; micro-batches per rank: {job.micro_batches} of {job.micro_batch_tokens} tokens, "
        f"{job.training.precision}{recompute}",
        f"  peak tensors of a rank       {format_bytes(plan.memory_bytes)}{too_large}",
        *(f"    {kind:26s} {format_bytes(count)}" for kind, count in estimate_peak_memory(job).items() if count),
        "    not included               libraries (0.4 GB on a CPU), pages of mapped files, allocator cache",
        f"  FLOPs per step               {format_count(flops)} ({format_count(flops / tokens)} per token)",
        f"  time per step                {format_duration(plan.seconds)}, pipeline bubble {plan.bubble:.0%}",
        f"    of it traffic              {format_duration(plan.traffic_seconds)} (assumed: {NODE_SPEED / 1e9:.0f} GB/s "
        f"in a node of {DEVICES_PER_NODE}, {NETWORK_SPEED / 1e9:.0f} GB/s between)",
        f"  time for {f'{job.training.steps} steps':19s} {format_duration(plan.seconds * job.training.steps)}",
        f"  sent by a rank per step      {'' if traffic else 'nothing'}".rstrip(),
        *(f"    {kind:26s} {format_bytes(count)}" for kind, count in traffic.items()),
        f"  fewest devices of {format_bytes(device_bytes):10s} {_describe_smallest(smallest)}",
    ]


def _describe_smallest(plan: layout_search.LayoutPlan | None) -> str:
    if plan is None:
        return "more than 4096"
    return f"{plan.job.world_size}: {plan.description}, {format_bytes(plan.memory_bytes)}"


def describe_refused_layouts(title: str, job: PlannedJob) -> list[str]:
    """Lists the invalid layouts of the job's processes, one line per reason."""
    layouts: dict[tuple[str, ...], list[str]] = {}
    for candidate in layout_search.iterate_layouts(job):
        problems = layout_search.find_problems(candidate)
        if problems:
            parallel = candidate.parallel
            layouts.setdefault(problems, []).append(f"{parallel.tp}x{parallel.pp} Z{parallel.zero}")
    lines = (f"  {', '.join(names)}: {' '.join(problems)}" for problems, names in layouts.items())
    return [f"{title}: invalid layouts (tp x pp, ZeRO)", *lines]


def describe_growth(operator: Operator, formats: tuple[str, ...], dtype: str) -> list[str]:
    """Describes the application of the operator: FLOPs, bytes written, memory while it streams."""
    small, large = operator.small, operator.large
    specs = [spec for spec in operator.arch.params if spec.is_stored(large)]
    largest = max(prod(spec.shape(large)) for spec in specs)
    written = parameter_count.count_model(large) * DTYPE_BYTES[dtype] * len(formats)
    flops = 0
    for spec in specs:
        if len(spec.axes) == 2:
            times = large.num_layers if spec.in_layer else 1
            (n, m), (a, b) = spec.shape(large), spec.shape(small)
            flops += 2 * times * (n * a * b + n * b * m)
    written_label = f"written ({', '.join(formats)})"
    return [
        "growth",
        f"  FLOPs                        at most {format_count(flops)}",
        f"  {written_label:28s} {format_bytes(written)}",
        f"  memory while streaming       about {format_bytes(4 * 4 * largest)} "
        "(the largest tensor, its sources, the write queue)",
    ]


def describe_checkpoints(operator: Operator, large_dtype: str) -> list[str]:
    """Lists the sizes of the checkpoints that the run writes."""
    total = parameter_count.count_model(operator.large)
    dense = sum(prod(shape) for name, shape in operator.shapes().items() if not name.startswith("gain"))
    trained = sum(operator.count_parameters().values())
    return [
        "checkpoints",
        f"  operator                     {format_bytes(4 * dense)}",
        f"  fit (for resuming)           {format_bytes(16 * trained)}",
        f"  pretraining                  {format_bytes((12 + DTYPE_BYTES[large_dtype]) * total)}",
    ]
