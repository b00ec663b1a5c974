"""The planned cost of each pair in launch_scripts/pairs, as the table of pairs.md: `pairs.py` from the repository."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
FOLDER = ROOT / "launch_scripts/pairs"
WORLD = 8


def lines() -> Iterator[str]:
    from megatron_ligo.config.run_config import RunConfig
    from megatron_ligo.growth.validation import build_initial_operator
    from megatron_ligo.plan import layout_search, parameter_count
    from megatron_ligo.plan.memory import estimate_peak_memory
    from megatron_ligo.plan.plan_text import format_bytes, format_count
    from megatron_ligo.plan.planned_job import PlannedJob
    from megatron_ligo.training.initial_weights import read_model_config

    for path in sorted(FOLDER.glob("*.toml")):
        config = RunConfig.load(path)
        operator = build_initial_operator(read_model_config(ROOT / config.small.path), config.large, config.operator)
        small, large = operator.small, operator.large
        length = large.tokens_of_sample(config.data.seq_length)
        fit = PlannedJob(large, config.fit, WORLD, length, operator)
        plain = PlannedJob(large, config.pretrain, WORLD, length)
        for job in (fit, plain):
            problems = layout_search.find_problems(job)
            assert not problems, f"{path.name}: {problems}"
        step = fit.step_flops() / plain.step_flops()
        cells = [
            path.stem,
            f"{format_count(parameter_count.count_model(small))} to {format_count(parameter_count.count_model(large))}",
            format_count(sum(operator.count_parameters().values())),
            f"{step:.2f}",
            f"{step * config.fit.steps / config.pretrain.steps:.2%}",
            *(format_bytes(sum(estimate_peak_memory(job).values())) for job in (fit, plain)),
        ]
        yield "| " + " | ".join(cells)


if __name__ == "__main__":
    print("\n".join(lines()))
