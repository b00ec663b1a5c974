"""Formats the table of large growths on many devices: extrapolated, with its assumptions stated above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import FitSection, LargeSection, OperatorSection, PretrainSection
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning import layout_search
from megatron_ligo.planning.plan_text import format_bytes, format_duration
from megatron_ligo.planning.planned_job import PlannedJob

WORLD_SIZES = (64, 128, 256, 512, 1024)
SEQ_LENGTH, GLOBAL_BATCH_SIZE, FIT_STEPS, OPERATOR_RANK = 4096, 1024, 100, 256
MODEL_1B = {"num_layers": 16, "hidden_size": 2048, "ffn_size": 8192, "num_heads": 32, "num_kv_heads": 8}
MODEL_10B = {"num_layers": 32, "hidden_size": 5120, "ffn_size": 16384, "num_heads": 80, "num_kv_heads": 20}
MODEL_100B = {"num_layers": 80, "hidden_size": 10240, "ffn_size": 32768, "num_heads": 160, "num_kv_heads": 40}
GROWTHS = {"1B to 10B": (MODEL_1B, MODEL_10B), "10B to 100B": (MODEL_10B, MODEL_100B)}
KINDS = ("fit, whole", "fit, rank", "pretraining")


def format_scaling_table(
    flops_per_second: float,
    device_bytes: float,
    growths: Sequence[str] = tuple(GROWTHS),
    world_sizes: Sequence[int] = WORLD_SIZES,
) -> list[str]:
    """Formats the assumptions and one line per growth, number of devices and kind of job."""
    assumptions = [
        f"Assumptions: {flops_per_second / 1e12:.0f} TFLOP/s sustained and {format_bytes(device_bytes)} per device,",
        f"bf16, sequences of {SEQ_LENGTH} tokens, {GLOBAL_BATCH_SIZE} sequences per step, micro-batches of 1, full",
        f"recomputation, traffic beside compute, tensor parallelism of at most {layout_search.MAX_TP}",
        f"with sequence parallelism, {FIT_STEPS} fit steps. Each line shows the fastest layout that fits.",
        "Extrapolated, not measured.",
        "",
        f"{'growth':12s} {'devices':>7s} {'job':14s} {'layout':38s} {'memory':>9s} {'bubble':>6s} "
        f"{'step':>9s} {'fit':>9s}",
    ]
    rows = [
        _format_row(name, world_size, kind, flops_per_second, device_bytes)
        for name in growths
        for world_size in world_sizes
        for kind in KINDS
    ]
    return assumptions + rows


@cache
def _build_operator(name: str, rank: int) -> Operator:
    small, large = GROWTHS[name]
    fixed = {"arch": "llama", "model_type": "llama", "max_positions": 8192, "norm_eps": 1e-5, "rope_base": 5e5}
    model_config = ModelConfig(**fixed, **small, head_dim=64, vocab_size=128256)
    return build_initial_operator(model_config, LargeSection(**large), OperatorSection(rank=rank))


@cache
def _build_job(name: str, kind: str) -> PlannedJob:
    operator = _build_operator(name, OPERATOR_RANK if kind == "fit, rank" else 0)
    shared = {"global_batch_size": GLOBAL_BATCH_SIZE, "micro_batch_size": 1, "precision": "bf16", "recompute": True}
    if kind == "pretraining":
        return PlannedJob(operator.large, PretrainSection(**shared), 1, SEQ_LENGTH)
    fit = FitSection(**shared, steps=FIT_STEPS)
    return PlannedJob(operator.large, fit, 1, SEQ_LENGTH, operator, source_bytes=2)


def _format_row(name: str, world_size: int, kind: str, flops_per_second: float, device_bytes: float) -> str:
    job = replace(_build_job(name, kind), world_size=world_size)
    plans = layout_search.find_fitting_layouts(job, flops_per_second, device_bytes)
    head = f"{name:12s} {world_size:7d} {kind:14s}"
    if not plans:
        return f"{head} does not fit"
    best = plans[0]
    memory, step = format_bytes(best.memory_bytes), format_duration(best.seconds)
    fit = "" if job.operator is None else format_duration(best.seconds * FIT_STEPS)
    return f"{head} {best.description:38s} {memory:>9s} {best.bubble:6.0%} {step:>9s} {fit:>9s}"
