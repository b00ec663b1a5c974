"""What an arm costs before its first step, known before any of it is run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.experiments.compare.comparison_config import Arm, fitted_arm_of
from megatron_ligo.growth.fit_flops import fit_step_flops
from megatron_ligo.growth.validation import initial_operator
from megatron_ligo.training.fit import within_budget
from megatron_ligo.training.initial_weights import sizes


def fit_flops(config: RunConfig, small: ModelConfig, lagged: bool = False) -> float:
    """Of [fit]; what patience may end sooner is counted whole."""
    steps, step = _fit_steps(config, small, lagged)
    return steps * step


def check_arm_costs(plan: ComparisonPlan, arms: Iterable[Arm]) -> None:
    """ConfigError with every arm that what comes before its runs leaves nothing of. One that is begun is let be: what
    is done of it can be collected."""
    compare, errors = plan.spec.compare, ErrorCollector("what comes before an arm's runs costs too much", ConfigError)
    limits = {"budgets": max(compare.budgets)} | ({"tune_budget": compare.tune_budget} if len(compare.lrs) > 1 else {})
    small = sizes(Path(plan.spec.config.small.path))
    for arm in (arm for arm in arms if (arm.fitted or arm.full) and not plan.begun(arm)):
        beside = arm if arm.fitted else fitted_arm_of(arm, plan.spec.arms)
        try:
            cost = _cost_before_runs(plan, arm, small)
        except ConfigError as error:
            errors.add(f"arms.{beside.name}", "a fit of one step or more", f"{error}")
            continue
        what = "the fit" if arm.fitted else f"full training on the fit's batches ({arm.name})"
        found = f"{cost / plan.unit:.3g} of scratch's FLOPs{f', {arm.lag} steps of lag among them' * bool(arm.lag)}"
        # Rounded up, so that what is advised is enough.
        enough = math.ceil((cost + plan.step_flops) / plan.unit * 1000) / 1000
        for key, budget in limits.items():
            if plan.steps(budget, cost) < 1:
                hint = f"Set compare.{key} to {enough:g} or more, or arms.{beside.name}.fit.steps to fewer."
                errors.add(f"arms.{beside.name}", f"{what} within compare.{key} = {budget:g}", found, hint)
    errors.raise_if_any()


def _cost_before_runs(plan: ComparisonPlan, arm: Arm, small: ModelConfig) -> float:
    config, lagged = arm.config, bool(arm.lag)
    if arm.fitted:
        return fit_flops(config, small, lagged) + arm.lag * plan.step_flops
    beside = fitted_arm_of(arm, plan.spec.arms)
    seq = plan.large.tokens_of_sample(config.data.seq_length)
    steps, _ = _fit_steps(config, small, bool(beside.lag))
    return steps * train_flops(plan.large, config.fit.global_batch_size * seq, seq)


def _fit_steps(config: RunConfig, small: ModelConfig, lagged: bool) -> tuple[int, float]:
    """(steps, FLOPs of one), as max_flops pays for them. ConfigError if it pays for none."""
    fit, operator = config.fit, initial_operator(small, config.large, config.operator)
    seq = operator.large.tokens_of_sample(config.data.seq_length)
    step = fit_step_flops(operator, fit.global_batch_size * seq, seq, fit.distill > 0, lagged)
    return within_budget(fit, step).steps, step
