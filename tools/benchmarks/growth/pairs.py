"""Prints the planned cost of each pair of launch_scripts/pairs as rows of the table in pairs.md."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
PAIRS_FOLDER = ROOT / "launch_scripts/pairs"
WORLD_SIZE = 8


def format_rows() -> Iterator[str]:
    from megatron_ligo.config.run_config import RunConfig
    from megatron_ligo.growth.validation import build_initial_operator
    from megatron_ligo.planning import layout_search, parameter_count
    from megatron_ligo.planning.memory import estimate_peak_memory
    from megatron_ligo.planning.plan_text import format_bytes, format_count
    from megatron_ligo.planning.planned_job import PlannedJob
    from megatron_ligo.training.initial_weights import read_model_config

    for path in sorted(PAIRS_FOLDER.glob("*.toml")):
        config = RunConfig.load(path)
        operator = build_initial_operator(read_model_config(ROOT / config.small.path), config.large, config.operator)
        small, large = operator.small, operator.large
        seq_length = large.tokens_per_sample(config.data.seq_length)
        fit = PlannedJob(large, config.fit, WORLD_SIZE, seq_length, operator)
        pretraining = PlannedJob(large, config.pretrain, WORLD_SIZE, seq_length)
        for job in (fit, pretraining):
            problems = layout_search.find_problems(job)
            assert not problems, f"{path.name}: {problems}"
        step_ratio = fit.step_flops() / pretraining.step_flops()
        cells = [
            path.stem,
            f"{format_count(parameter_count.count_model(small))} to {format_count(parameter_count.count_model(large))}",
            format_count(sum(operator.count_parameters().values())),
            f"{step_ratio:.2f}",
            f"{step_ratio * config.fit.steps / config.pretrain.steps:.2%}",
            *(format_bytes(sum(estimate_peak_memory(job).values())) for job in (fit, pretraining)),
        ]
        yield "| " + " | ".join(cells)


if __name__ == "__main__":
    print("\n".join(format_rows()))
