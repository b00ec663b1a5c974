"""What comes before an arm's runs, held against the budgets before any of it is run."""

from pathlib import Path

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.experiments.compare import arm_cost, comparison
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.training.initial_weights import sizes
from tests.experiments.compare.made_up_runs import MadeUp, made_spec

RATES, LONG = "compare.lrs=[1e-3, 2e-3]", "arms.learned.fit.steps=40"


def planned(folder: Path, *sets: str) -> ComparisonPlan:
    return MadeUp(folder, lambda name: 2.0).plan(made_spec(folder, *sets))


def share_of_fit(plan: ComparisonPlan, lagged: bool = False) -> float:
    config = next(arm for arm in plan.spec.arms if arm.fitted).config
    return arm_cost.fit_flops(config, sizes(Path(config.small.path)), lagged) / plan.unit


def refusal(plan: ComparisonPlan) -> str:
    with pytest.raises(ConfigError) as caught:
        arm_cost.check_arm_costs(plan, plan.spec.arms)
    return str(caught.value)


def test_a_fit_that_no_try_can_pay_is_refused_before_anything_runs(tmp_path):
    spec = made_spec(tmp_path, RATES, LONG)
    share = share_of_fit(planned(tmp_path, RATES, LONG))
    assert 0.25 < share < 1.0
    with pytest.raises(ConfigError) as caught:
        comparison.run_comparison(spec, tmp_path / "out")
    text = str(caught.value)
    assert "arms.learned: expected the fit within compare.tune_budget = 0.25" in text
    assert f"found {share:.3g} of scratch's FLOPs" in text and "arms.learned.fit.steps to fewer" in text
    assert "full training on the fit's batches (learned.full) within compare.tune_budget" in text
    assert "compare.budgets" not in text and not (tmp_path / "out").exists()


def test_what_the_refusal_advises_is_enough(tmp_path):
    text = refusal(planned(tmp_path, RATES, LONG))
    advised = max(float(part.split(" or more")[0]) for part in text.split("Set compare.tune_budget to ")[1:])
    plan = planned(tmp_path, RATES, LONG, f"compare.tune_budget={advised}")
    arm_cost.check_arm_costs(plan, plan.spec.arms)


def test_one_rate_needs_no_try_and_only_a_budget_that_pays(tmp_path):
    plan = planned(tmp_path, LONG)
    arm_cost.check_arm_costs(plan, plan.spec.arms)
    assert "within compare.budgets = 0.25" in refusal(planned(tmp_path, LONG, "compare.budgets=[0.1, 0.25]"))


def test_a_lag_and_max_flops_count(tmp_path):
    lag = planned(tmp_path, "arms.learned.lag=24", RATES)
    found = share_of_fit(lag, lagged=True) + 0.24
    assert f"found {found:.3g} of scratch's FLOPs, 24 steps of lag among them" in refusal(lag)
    plan = planned(tmp_path, RATES, LONG, f"arms.learned.fit.max_flops={0.05 * lag.unit}")
    assert share_of_fit(plan) <= 0.05
    arm_cost.check_arm_costs(plan, plan.spec.arms)


def test_a_fit_that_max_flops_pays_no_step_of_is_refused(tmp_path):
    text = refusal(planned(tmp_path, "arms.learned.fit.max_flops=1.0"))
    assert "arms.learned: expected a fit of one step or more" in text and "fit.max_flops: expected at least" in text


def test_what_is_begun_can_be_collected(tmp_path):
    plan = planned(tmp_path, RATES, LONG)
    for name in ("learned", "learned.full"):
        (tmp_path / name).mkdir()
    arm_cost.check_arm_costs(plan, plan.spec.arms)
