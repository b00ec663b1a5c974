"""Tests the parts of a plan that need no run: schedule, layouts, parameters and memory by kind, text."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from megatron_ligo.commands.studies import plan
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import (
    FitSection,
    LargeSection,
    OperatorSection,
    ParallelSection,
    PretrainSection,
)
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning import layout_search, parameter_count, pipeline_schedule, plan_text, scaling_table
from megatron_ligo.planning.memory import estimate_peak_memory
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.planning.traffic import NODE_SPEED, estimate_traffic
from tests.models.full.pretrain_cases import sizes
from tests.planning.model_parameters import count_parameters
from tests.tiny_models import hf_llama, llama_config

SMALL = llama_config(num_layers=2, hidden_size=48, num_heads=8, num_kv_heads=4, head_dim=8, ffn_size=80)
LARGE = {"hidden_size": 96, "num_heads": 16, "num_kv_heads": 8, "ffn_size": 240, "num_layers": 4}


def planned_fit(world_size: int = 1, **layout) -> PlannedJob:
    operator = build_initial_operator(SMALL, LargeSection(**LARGE), OperatorSection())
    training = FitSection(global_batch_size=8, parallel=ParallelSection(**layout))
    return PlannedJob(operator.large, training, world_size, 32, operator)


def test_time_counts_traffic():
    """Two ranks halve the computation; what they send comes on top of it, and slower between nodes."""
    alone, shared, far = (
        layout_search.plan_layout(replace(planned_fit(world, tp=tp), operator=None), 1e9)
        for world, tp in ((1, 1), (2, 2), (16, 2))
    )
    assert alone.traffic_seconds == 0
    assert shared.traffic_seconds == pytest.approx(sum(estimate_traffic(shared.job).values()) / NODE_SPEED)
    assert shared.seconds == pytest.approx(alone.seconds / 2 + shared.traffic_seconds)
    assert far.traffic_seconds > sum(estimate_traffic(far.job).values()) / NODE_SPEED > 0


@pytest.mark.parametrize(("stages", "micro_batches"), list(itertools.product((1, 2, 4), (1, 2, 8))))
def test_equal_stages_have_the_known_bubble(stages, micro_batches):
    forward, backward = [1.0] * stages, [2.0] * stages
    seconds = pipeline_schedule.simulate_step(forward, backward, micro_batches)
    assert seconds == pytest.approx(3.0 * (micro_batches + stages - 1))
    bubble = pipeline_schedule.compute_bubble(forward, backward, micro_batches, seconds)
    assert bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


def test_transfers_and_a_slow_stage_lengthen_a_step():
    even = pipeline_schedule.simulate_step([1, 1], [2, 2], 4)
    assert pipeline_schedule.simulate_step([1, 1], [2, 2], 4, sending=0.1) > even
    assert pipeline_schedule.simulate_step([1, 1.5], [2, 3], 4) > even


INVALID = {
    "processes": (planned_fit(6, tp=4), "number of processes", "6"),
    "ZeRO": (planned_fit(2, pp=2, zero=2), "zero with pp = 2", "2"),
    "batch": (planned_fit(3), "global_batch_size", "8"),
    "heads": (planned_fit(16, tp=16), "tp = 16", "num_kv_heads = 8"),
    "layers": (planned_fit(8, pp=8), "pp = 8", "4 layers"),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_layout_is_reported_with_its_problem(case):
    job, where, result = INVALID[case]
    assert (where, result) in [(problem.where, problem.found) for problem in layout_search.find_problems(job)]


def test_a_valid_layout_has_no_problem():
    assert layout_search.find_problems(planned_fit(2, tp=2)) == ()


def test_parameters_match_the_model_and_the_operator():
    job = planned_fit()
    large = job.large
    assert parameter_count.count_model(large) == sum(p.numel() for p in hf_llama(large).parameters())
    pretraining = replace(job, training=PretrainSection(parallel=ParallelSection(pp=2)), operator=None, world_size=2)
    stages = [parameter_count.count_model_on_rank(pretraining, stage) for stage in range(2)]
    assert sum(stages) == parameter_count.count_model(large)
    trained = sum(job.operator.count_parameters().values())
    assert parameter_count.count_operator_on_rank(job.operator, 1, large.num_layers) == trained


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2}], ids=["pp2", "tp2"])
@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *((family, True) for family in ("llama", "gpt2", "bert", "roberta")),
        *((family, False) for family in ("bert", "vit", "deit", "dinov2")),
    ],
)
def test_parameters_of_a_rank_match_the_real_model(pools, family, tied, layout):
    """Embeddings, class tokens and input norms lie on the first stage; the final norm and heads on the last."""
    ranks = pools(2).run(count_parameters, family=family, tied=tied, layout=layout)
    training = PretrainSection(parallel=ParallelSection(**layout))
    job = PlannedJob(sizes(tied, family), training, 2, 16)
    for stage, count in ranks:
        assert parameter_count.count_model_on_rank(job, stage) == count


def test_sharding_lowers_the_memory_of_a_rank():
    def total(**layout) -> int:
        return sum(estimate_peak_memory(planned_fit(4, **layout)).values())

    assert total(tp=2) < total()
    assert total(pp=2) < total()
    assert total(zero=3) < total(zero=1)


def test_the_fewest_devices_hold_the_job_and_fewer_do_not():
    job = planned_fit()
    device_bytes = 0.6 * sum(estimate_peak_memory(job).values())
    plan = layout_search.find_smallest_layout(job, 1e9, device_bytes)
    assert plan.memory_bytes <= device_bytes
    fewer = replace(job, world_size=plan.job.world_size // 2)
    assert not layout_search.find_fitting_layouts(fewer, 1e9, device_bytes)
    assert layout_search.find_smallest_layout(job, 1e9, 1.0) is None


def test_the_text_lists_every_kind():
    job = planned_fit(4, tp=2, pp=2)
    lines = plan_text.describe_run("fit", job, 1e12, 1e9)
    kinds = {line[4:30].strip() for line in lines if line.startswith("    ")}
    for counts in (estimate_peak_memory(job), estimate_traffic(job)):
        assert {kind for kind, count in counts.items() if count} <= kinds
    assert {"operator", "gradients", "optimizer", "source", "activations"} <= kinds
    assert any(plan_text.format_count(job.step_flops()) in line for line in lines)
    names = " ".join(plan_text.describe_models(job.operator))
    assert all(name in names for name in job.operator.maps)


def test_the_text_of_an_invalid_layout_has_its_problems():
    job = planned_fit(2, pp=2, zero=2)
    (problem,) = layout_search.find_problems(job)
    (line,) = plan_text.describe_run("fit", job, 1e12, 1e9)
    assert problem in line
    assert any(problem in line for line in plan_text.describe_refused_layouts("fit", job))


def test_the_table_of_large_growths():
    growth = next(iter(scaling_table.GROWTHS))
    lines = scaling_table.format_scaling_table(300e12, 80e9, [growth], [64])
    rows = [line for line in lines if line.startswith(growth)]
    assert len(rows) == len(scaling_table.KINDS)
    assert any("Extrapolated, not measured." in line for line in lines)
    assert all("tp" in row and "GB" in row for row in rows)


def test_a_plan_whose_layout_is_invalid_proposes_no_fit(tmp_path, capsys):
    hf_llama(SMALL).save_pretrained(tmp_path)
    for world, expected in ((2, "next: ligo fit --processes 2"), (3, "next: another --processes")):
        plan.run(
            plan.build_parser().parse_args(
                ["--set=data.seq_length=8", f"--set=small.path={tmp_path}", f"--processes={world}"]
            )
        )
        printed = capsys.readouterr().out
        assert ("invalid layout" in printed) == (world == 3) and expected in printed


@pytest.mark.parametrize("size", ["num_layers", "num_experts"])
def test_a_size_beyond_any_model_is_refused_at_once(size):
    with pytest.raises(ConfigError, match=f"{size}: expected at most 10000, found 9223372036854775807"):
        replace(SMALL, **{size: 2**63 - 1}, **({"top_k": 2} if size == "num_experts" else {}))
