"""Plans of models with experts, and of the launch files for true sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ligo.config.run_config import ParallelSection, RunConfig
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning import layout_search
from megatron_ligo.planning.memory import estimate_peak_memory
from megatron_ligo.planning.parameter_count import count_active, count_model
from megatron_ligo.planning.run_plan import plan_run
from megatron_ligo.planning.traffic import estimate_traffic
from megatron_ligo.training.initial_weights import read_model_config
from tests.planning.pair_models import ROOT

# Parameters, those of a token, and the fewest devices of 80 GB, in all.
FILES = {
    "llama-1b-to-8x1b": (6.87e9, 2.04e9, 2),
    "olmoe-7b-to-13b": (13.36e9, 2.09e9, 4),
    "qwen3-0.6b-to-3b-a0.6b": (2.98e9, 0.6e9, 1),
}
FOLDER = ROOT / "launch_scripts/experts"


def load(name: str) -> RunConfig:
    config = RunConfig.load(FOLDER / f"{name}.toml")
    return replace(config, small=replace(config.small, path=str(ROOT / config.small.path)))


def test_every_file_is_planned():
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_plan_counts_experts(name):
    total, active, fewest = FILES[name]
    config = load(name)
    operator = build_initial_operator(read_model_config(ROOT / config.small.path), config.large, config.operator)
    assert count_model(operator.large) == pytest.approx(total, rel=0.01)
    assert count_active(operator.large) == pytest.approx(active, rel=0.01)
    plan = plan_run(config, 8, 80e9, 400e12)
    assert not layout_search.find_problems(plan.pretrain)
    # Six operations a parameter and token, but for the table of embeddings, and attention.
    per_token = plan.pretrain.step_flops() / (config.pretrain.global_batch_size * config.data.seq_length)
    assert 0.9 < per_token / (6 * active) < 1.9
    smallest = layout_search.find_smallest_layout(plan.pretrain, 400e12, 80e9, max_devices=64)
    assert smallest.job.world_size == fewest and smallest.memory_bytes <= 80e9
    text = str(plan)
    assert "of them for a token" in text and "expert parallel" in text
    assert "invalid layout" not in text


def test_expert_parallel_ranks_hold_less_and_send_more():
    plan = plan_run(load("llama-1b-to-8x1b"), 8, 80e9, 400e12).pretrain

    def at(ep: int) -> tuple[int, dict[str, int]]:
        parallel = ParallelSection(ep=ep, zero=1)
        job = replace(plan, training=replace(plan.training, parallel=parallel))
        return estimate_peak_memory(job)["weights"], estimate_traffic(job)

    weights, traffic = zip(*(at(ep) for ep in (1, 2, 4, 8)), strict=True)
    assert list(weights) == sorted(weights, reverse=True)
    sent = [kinds.get("expert parallel", 0) for kinds in traffic]
    assert sent[0] == 0 and sent == sorted(sent)
    assert traffic[0]["data parallel"] > traffic[3]["data parallel"]
    uneven = replace(plan, training=replace(plan.training, parallel=ParallelSection(ep=3)))
    assert layout_search.find_problems(uneven)
