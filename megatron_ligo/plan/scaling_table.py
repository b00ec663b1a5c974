"""The table of large growths on many devices, extrapolated; its assumptions stand above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import FitSection, LargeSection, OperatorSection, PretrainSection
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import initial_operator
from megatron_ligo.plan import layout_search
from megatron_ligo.plan.plan_text import duration, size
from megatron_ligo.plan.planned_job import Job

WORLDS = (64, 128, 256, 512, 1024)
SEQ, BATCH, FIT_STEPS, RANK = 4096, 1024, 100, 256
ONE = {"num_layers": 16, "hidden_size": 2048, "ffn_size": 8192, "num_heads": 32, "num_kv_heads": 8}
TEN = {"num_layers": 32, "hidden_size": 5120, "ffn_size": 16384, "num_heads": 80, "num_kv_heads": 20}
HUNDRED = {"num_layers": 80, "hidden_size": 10240, "ffn_size": 32768, "num_heads": 160, "num_kv_heads": 40}
GROWTHS = {"1B to 10B": (ONE, TEN), "10B to 100B": (TEN, HUNDRED)}


def lines(
    flops_per_second: float,
    device_bytes: float,
    growths: Sequence[str] = tuple(GROWTHS),
    worlds: Sequence[int] = WORLDS,
) -> list[str]:
    assumed = [
        f"Assumed: {flops_per_second / 1e12:.0f} TFLOP/s sustained and {size(device_bytes)} on each device, bf16,",
        f"sequences of {SEQ}, {BATCH} of them a step, micro-batches of 1, everything recomputed, traffic hidden behind",
        f"the products, tensor parallelism of at most {layout_search.LARGEST_TP} with sequence parallelism; a fit of",
        f"{FIT_STEPS} steps. The fastest layout that fits is shown. Extrapolated, not measured.",
        "",
        f"{'growth':12s} {'devices':>7s} {'what':14s} {'layout':38s} {'memory':>9s} {'bubble':>6s} "
        f"{'step':>9s} {'fit':>9s}",
    ]
    found = [
        _row(name, world, kind, flops_per_second, device_bytes)
        for name in growths
        for world in worlds
        for kind in KINDS
    ]
    return assumed + found


@cache
def _operator(name: str, rank: int) -> Operator:
    small, large = GROWTHS[name]
    fixed = {"arch": "llama", "model_type": "llama", "max_positions": 8192, "norm_eps": 1e-5, "rope_base": 5e5}
    model_config = ModelConfig(**fixed, **small, head_dim=64, vocab_size=128256)
    return initial_operator(model_config, LargeSection(**large), OperatorSection(rank=rank))


@cache
def _job(name: str, kind: str) -> Job:
    operator = _operator(name, RANK if kind == "fit, rank" else 0)
    shared = {"global_batch_size": BATCH, "micro_batch_size": 1, "precision": "bf16", "recompute": True}
    if kind == "pretraining":
        return Job(operator.large, PretrainSection(**shared), 1, SEQ)
    run = FitSection(**shared, steps=FIT_STEPS)
    return Job(operator.large, run, 1, SEQ, operator, source_bytes=2)


KINDS = ("fit, whole", "fit, rank", "pretraining")


def _row(name: str, world: int, kind: str, flops_per_second: float, device_bytes: float) -> str:
    job = replace(_job(name, kind), world=world)
    plans = layout_search.fitting(job, flops_per_second, device_bytes)
    head = f"{name:12s} {world:7d} {kind:14s}"
    if not plans:
        return f"{head} does not fit"
    best = plans[0]
    whole = "" if job.operator is None else duration(best.seconds * FIT_STEPS)
    return (
        f"{head} {best.words:38s} {size(best.memory):>9s} {best.bubble:6.0%} {duration(best.seconds):>9s} {whole:>9s}"
    )
