"""The plan's parts that need no run: the schedule, refused layouts, what is held by kind, the page and the table."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_ligo.config.run_config import (
    FitSection,
    LargeSection,
    OperatorSection,
    ParallelSection,
    PretrainSection,
)
from megatron_ligo.growth.validation import initial_operator
from megatron_ligo.plan import layout_search, parameter_count, pipeline_schedule, plan_text, scaling_table
from megatron_ligo.plan.memory import estimate_peak_memory
from megatron_ligo.plan.planned_job import PlannedJob
from tests.tiny_models import hf_llama, llama_dims

SMALL = llama_dims(num_layers=2, hidden_size=48, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=80)
LARGE = {"hidden_size": 96, "num_heads": 16, "num_kv_heads": 8, "ffn_size": 240, "num_layers": 4}


def fit(world: int = 1, **layout) -> PlannedJob:
    operator = initial_operator(SMALL, LargeSection(**LARGE), OperatorSection())
    run = FitSection(global_batch_size=8, parallel=ParallelSection(**layout))
    return PlannedJob(operator.large, run, world, 32, operator)


@pytest.mark.parametrize(("stages", "micro_batches"), list(itertools.product((1, 2, 4), (1, 2, 8))))
def test_equal_stages_have_the_known_bubble(stages, micro_batches):
    forward, backward = [1.0] * stages, [2.0] * stages
    seconds = pipeline_schedule.simulate_step(forward, backward, micro_batches)
    assert seconds == pytest.approx(3.0 * (micro_batches + stages - 1))
    bubble = pipeline_schedule.compute_bubble(forward, backward, micro_batches, seconds)
    assert bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_sending_and_a_slow_stage_lengthen_a_step():
    even = pipeline_schedule.simulate_step([1, 1], [2, 2], 4)
    assert pipeline_schedule.simulate_step([1, 1], [2, 2], 4, sending=0.1) > even
    assert pipeline_schedule.simulate_step([1, 1.5], [2, 3], 4) > even


REFUSED = {
    "processes": (fit(6, tp=4), "no multiple of tp x pp = 4"),
    "ZeRO": (fit(2, pp=2, zero=2), "takes ZeRO 1 only"),
    "batch": (fit(3), "no multiple of micro_batch_size x dp = 3"),
    "heads": (fit(16, tp=16), "num_kv_heads"),
    "layers": (fit(8, pp=8), "at most a stage a layer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_layout_that_cannot_be_is_refused_with_the_reason(case):
    job, reason = REFUSED[case]
    assert reason in layout_search.find_refusal(job)
    assert layout_search.find_refusal(fit(2, tp=2)) is None


def test_parameters_are_those_of_the_model_and_of_the_operator():
    job = fit()
    model_config = job.large
    assert parameter_count.count_model(model_config) == sum(p.numel() for p in hf_llama(model_config).parameters())
    stages = [replace(job, run=PretrainSection(parallel=ParallelSection(pp=2)), operator=None, world=2)] * 2
    assert sum(
        parameter_count.count_model_on_rank(one, stage) for stage, one in enumerate(stages)
    ) == parameter_count.count_model(model_config)
    assert parameter_count.count_operator_on_rank(job.operator, 1, model_config.num_layers) == sum(
        job.operator.num_parameters().values()
    )


def test_sharding_leaves_less_on_a_rank():
    def held(**layout) -> int:
        return sum(estimate_peak_memory(fit(4, **layout)).values())

    assert held(tp=2) < held()
    assert held(pp=2) < held()
    assert held(zero=3) < held(zero=1)


def test_the_fewest_devices_hold_the_run_and_fewer_do_not():
    job = fit()
    room = 0.6 * sum(estimate_peak_memory(job).values())
    found = layout_search.find_smallest_layout(job, 1e9, room)
    assert found.memory_bytes <= room
    assert not layout_search.find_fitting_layouts(replace(job, world=found.job.world // 2), 1e9, room)
    assert layout_search.find_smallest_layout(job, 1e9, 1.0) is None


def test_the_page_says_all(tmp_path):
    job = fit(4, tp=2, pp=2)
    page = "\n".join(
        [
            *plan_text.describe_models(job.operator),
            *plan_text.describe_run("fit", job, 1e12, 1e9),
            *plan_text.describe_refused_layouts("fit", job),
        ]
    )
    for word in ("operator", "gradients", "optimizer", "source", "activations", "FLOPs of a step", "bubble", "sends"):
        assert word in page


def test_the_table_of_large_growths():
    growth = next(iter(scaling_table.GROWTHS))
    lines = scaling_table.format_scaling_table(300e12, 80e9, [growth], [64])
    rows = [line for line in lines if line.startswith(growth)]
    assert len(rows) == len(scaling_table.KINDS)
    assert any("Extrapolated, not measured." in line for line in lines)
    assert all("tp" in row and "GB" in row for row in rows)
