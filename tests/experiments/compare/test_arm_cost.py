"""The cost of an arm's preparation is checked against the budgets before anything runs."""

import re
from pathlib import Path

import pytest

from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.experiments.compare import arm_cost, comparison
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.training.initial_weights import read_model_config
from tests.experiments.compare.made_up_runs import MadeUpRuns, write_comparison

RATES, LONG = "compare.lrs=[1e-3, 2e-3]", "arms.learned.fit.steps=40"


def planned(folder: Path, *sets: str) -> ComparisonPlan:
    return MadeUpRuns(folder, lambda name: 2.0).plan(write_comparison(folder, *sets))


def share_of_fit(plan: ComparisonPlan, lagged: bool = False) -> float:
    config = next(arm for arm in plan.spec.arms if arm.fitted).config
    return arm_cost.fit_flops(config, read_model_config(Path(config.small.path)), lagged) / plan.unit


def refusals(plan: ComparisonPlan) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        arm_cost.check_arm_costs(plan, plan.spec.arms)
    return list(caught.value.problems)


def test_a_fit_that_no_try_can_pay_is_refused_before_anything_runs(tmp_path):
    spec = write_comparison(tmp_path, RATES, LONG)
    share = share_of_fit(planned(tmp_path, RATES, LONG))
    assert 0.25 < share < 1.0
    with pytest.raises(ConfigError) as caught:
        comparison.run_comparison(spec, tmp_path / "out")
    problems = caught.value.problems
    assert {problem.where for problem in problems} == {"arms.learned"}
    assert all("compare.tune_budget = 0.25" in problem.expected for problem in problems)
    assert f"{share:.3g} of scratch's FLOPs" in [problem.found for problem in problems]
    assert all("arms.learned.fit.steps" in problem.hint for problem in problems)
    assert any("learned.full" in problem.expected for problem in problems)
    assert "compare.budgets" not in str(caught.value) and not (tmp_path / "out").exists()


def test_what_the_refusal_advises_is_enough(tmp_path):
    problems = refusals(planned(tmp_path, RATES, LONG))
    advised = max(float(re.search(r"compare\.tune_budget to (\S+)", problem.hint)[1]) for problem in problems)
    plan = planned(tmp_path, RATES, LONG, f"compare.tune_budget={advised}")
    arm_cost.check_arm_costs(plan, plan.spec.arms)


def test_one_rate_needs_no_try_and_only_a_budget_that_pays(tmp_path):
    plan = planned(tmp_path, LONG)
    arm_cost.check_arm_costs(plan, plan.spec.arms)
    problems = refusals(planned(tmp_path, LONG, "compare.budgets=[0.1, 0.25]"))
    assert all("compare.budgets = 0.25" in problem.expected for problem in problems)


def test_a_lag_and_max_flops_count(tmp_path):
    lag = planned(tmp_path, "arms.learned.lag=24", RATES)
    share = share_of_fit(lag, lagged=True) + 0.24
    assert any(f"{share:.3g} of scratch's FLOPs, 24 lag steps" in problem.found for problem in refusals(lag))
    plan = planned(tmp_path, RATES, LONG, f"arms.learned.fit.max_flops={0.05 * lag.unit}")
    assert share_of_fit(plan) <= 0.05
    arm_cost.check_arm_costs(plan, plan.spec.arms)


def test_a_fit_that_max_flops_pays_no_step_of_is_refused(tmp_path):
    problems = refusals(planned(tmp_path, "arms.learned.fit.max_flops=1.0"))
    assert "arms.learned" in [problem.where for problem in problems]
    assert any("fit.max_flops" in problem.found for problem in problems)


def test_what_is_begun_can_be_collected(tmp_path):
    plan = planned(tmp_path, RATES, LONG)
    for name in ("learned", "learned.full"):
        (tmp_path / name).mkdir()
    arm_cost.check_arm_costs(plan, plan.spec.arms)
