"""Counts what one GPU would do in a micro-batch of a fit and of a plain step, without a GPU and without weights.

The real models run on fake tensors, as one rank of a world of any size: kernels, collectives with their bytes, and the
peak of the tensors beside what `tools/plan.py` plans for them (no optimizer). Nothing is timed.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_ligo.planning.planned_job import PlannedJob

log = logging.getLogger(__name__)

HELP = "kernels, collectives and memory of one rank of any fit and plain step, on fake tensors, without a GPU"
# Kernels of the fit's step over those of the plain one; planned over counted memory.
KERNEL_GOAL, MEMORY_GOAL = 1.5, 0.15
KINDS = ("fit", "plain")
SECTIONS = {"fit": "fit", "plain": "pretrain"}

LLAMA = {
    "arch": "llama", "model_type": "llama", "num_layers": 24, "hidden_size": 2048, "ffn_size": 8192, "num_heads": 32,
    "num_kv_heads": 32, "head_dim": 64, "vocab_size": 49152, "max_positions": 8192, "norm_eps": 1e-5, "tied": True,
    "rope_base": 1e4,
}  # fmt: skip
# The small model, the large one, tokens of a sequence, world size, and keys of the training section.
CASES = {
    "135m-1.35b": (
        LLAMA | {"num_layers": 30, "hidden_size": 576, "ffn_size": 1536, "num_heads": 9, "num_kv_heads": 3},
        {"num_layers": 32, "hidden_size": 1920, "ffn_size": 5120, "num_heads": 30, "num_kv_heads": 10},
        2048, 1, {"micro_batch_size": 4},
    ),
    "1.7b-7b": (
        LLAMA,
        {"num_layers": 32, "hidden_size": 4096, "ffn_size": 11008, "num_heads": 64, "num_kv_heads": 64},
        4096, 4, {"parallel": {"tp": 4}},
    ),
    "8b-30b": (
        LLAMA | {"num_layers": 32, "hidden_size": 4096, "ffn_size": 14336, "num_kv_heads": 8, "head_dim": 128}
        | {"vocab_size": 128256, "tied": False},
        {"num_layers": 60, "hidden_size": 6144, "ffn_size": 20480, "num_heads": 48, "num_kv_heads": 12},
        4096, 4, {"recompute": True, "parallel": {"tp": 4, "sequence_parallel": True}},
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", choices=CASES, help="sizes (default: all, some minutes)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="what to count (default: both)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the cases (default: bf16)")
    parser.add_argument("--config", metavar="RUN.toml", help="count the fit and the pretraining of a run instead")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override its keys")
    parser.add_argument(
        "--processes",
        "--world",
        dest="world",
        type=int,
        default=1,
        metavar="N",
        help="processes of the run (default: 1)",
    )


def measure(args: argparse.Namespace, folder: Path) -> dict:
    from megatron_ligo.bench.steps.fake_device import count_step
    from megatron_ligo.common.errors import ConfigError, Problem
    from megatron_ligo.config.run_config import RunConfig
    from megatron_ligo.planning.run_plan import plan_run

    kinds = args.kind or KINDS
    if args.world < 1:
        raise ConfigError(Problem("--processes", "at least 1", args.world))
    if args.config:
        plan = plan_run(RunConfig.load(args.config, args.set), args.world, 1.0, 1.0)
        # The small weights of a bf16 checkpoint.
        jobs = {args.config: {"fit": replace(plan.fit, source_bytes=2), "plain": plan.pretrain}}
        check_layouts({SECTIONS[kind]: jobs[args.config][kind] for kind in kinds})
    else:
        jobs = {name: build_jobs(name, args.precision) for name in args.case or CASES}
    results: dict = {"what": "kernels", "kernel_goal": KERNEL_GOAL, "memory_goal": MEMORY_GOAL, "cases": {}}
    for name, by_kind in jobs.items():
        counts = {kind: count_step(by_kind[kind]) for kind in kinds}
        results["cases"][name] = {
            kind: {
                "kernels": sum(count.kernels.values()),
                "per_layer": round(count.kernels_per_layer, 1),
                "forward": count.forward_kernels,
                "peak": count.peak,
                "planned": count.planned,
                "flops": count.flops,
                "collectives": count.collectives,
                "collective_bytes": count.collective_bytes,
                "by_operator": dict(sorted(count.kernels.items(), key=lambda item: -item[1])),
            }
            for kind, count in counts.items()
        }
        log.info("%s: counted", name)
    return results


def check_layouts(jobs: dict[str, PlannedJob]) -> None:
    """Raises ConfigError with all that rules out the layouts of a run's jobs, by their sections."""
    from megatron_ligo.bench.steps.fake_device import has_low_rank
    from megatron_ligo.common.errors import ConfigError, ErrorCollector
    from megatron_ligo.planning.layout_search import find_problems

    errors = ErrorCollector("the run cannot be counted", ConfigError)
    for section, job in jobs.items():
        for problem in find_problems(job):
            errors.add(f"[{section}] {problem.where}", problem.expected, problem.found, problem.hint)
        if job.parallel.pp > 1:
            errors.add(f"[{section}] pp", "1: stages are not counted", job.parallel.pp)
        if has_low_rank(job):
            errors.add("operator.rank", "0: low-rank maps are not counted", job.operator.settings.rank)
    errors.raise_if_any()


def build_jobs(case: str, precision: str) -> dict[str, PlannedJob]:
    """Returns the planned fit and pretraining of one of CASES."""
    from megatron_ligo.arch.model_config import ModelConfig
    from megatron_ligo.config.run_config import (
        FitSection,
        LargeSection,
        OperatorSection,
        ParallelSection,
        PretrainSection,
    )
    from megatron_ligo.growth.validation import build_initial_operator
    from megatron_ligo.planning.planned_job import PlannedJob

    small, large, seq_length, world_size, keys = CASES[case]
    operator = build_initial_operator(ModelConfig(**small), LargeSection(**large), OperatorSection())
    keys = {**keys, "precision": precision, "parallel": ParallelSection(**keys.get("parallel", {}))}
    keys["global_batch_size"] = keys.get("micro_batch_size", 1)
    fit = PlannedJob(operator.large, FitSection(**keys), world_size, seq_length, operator, source_bytes=2)
    return {"fit": fit, "plain": replace(fit, training=PretrainSection(**keys), operator=None)}


def format_text(results: dict) -> str:
    lines = ["one micro-batch, forward and backward, on one device (counted on fake tensors; nothing is timed)"]
    for name, kinds in results["cases"].items():
        lines.append(f"{name}")
        for kind, count in kinds.items():
            traffic = ", ".join(
                f"{number} {collective} of {count['collective_bytes'][collective] / 2**20:.0f} MiB"
                for collective, number in count["collectives"].items()
            )
            lines.append(
                f"  {kind:5s} {count['kernels']:6d} kernels, {count['per_layer']:5.1f} a layer; peak "
                f"{count['peak'] / 2**30:.2f} GiB, planned / counted {count['planned'] / count['peak']:.2f}; {traffic}"
            )
        if set(kinds) == set(KINDS):
            ratio = kinds["fit"]["kernels"] / kinds["plain"]["kernels"]
            lines.append(f"  the fit has {ratio:.2f} x the kernels of the plain step (goal: {results['kernel_goal']})")
    return "\n".join(lines)
