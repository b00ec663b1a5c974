"""Computes the FLOPs of an arm's preparation (fit, lag, full training) before anything runs."""

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
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.models.factored.fit_flops import fit_step_flops
from megatron_ligo.training.fit import limit_to_budget
from megatron_ligo.training.initial_weights import read_model_config


def fit_flops(config: RunConfig, small: ModelConfig, lagged: bool = False) -> float:
    """Returns the FLOPs of [fit]; a fit that patience may end early is counted in full."""
    steps, step = _fit_steps(config, small, lagged)
    return steps * step


def check_arm_costs(plan: ComparisonPlan, arms: Iterable[Arm]) -> None:
    """Raises ConfigError with every arm whose preparation (fit, lag) leaves no budget for its runs.

    Arms that have already begun pass: their finished runs can still be collected.
    """
    compare, errors = (
        plan.spec.compare,
        ErrorCollector("the preparation of some arms exceeds their budget", ConfigError),
    )
    is_tuned = len(compare.lrs) > 1 or bool(compare.fit_lrs)
    limits = {"budgets": max(compare.budgets)} | ({"tune_budget": compare.tune_budget} if is_tuned else {})
    small = read_model_config(Path(plan.spec.config.small.path), plan.spec.config.small.accept)
    for arm in (arm for arm in arms if (arm.fitted or arm.full) and not plan.begun(arm)):
        owner = arm if arm.fitted else fitted_arm_of(arm, plan.spec.arms)
        try:
            cost = _cost_before_runs(plan, arm, small)
        except ConfigError as error:
            errors.add(f"arms.{owner.name}", "a fit of at least one step", f"{error}")
            continue
        what = "the fit" if arm.fitted else f"full training on the fit's batches ({arm.name})"
        share = f"{cost / plan.unit:.3g} of scratch's FLOPs{f', {arm.lag} lag steps included' * bool(arm.lag)}"
        # Rounded up, so that the suggested value is enough.
        enough = math.ceil((cost + plan.step_flops) / plan.unit * 1000) / 1000
        for key, budget in limits.items():
            if plan.steps(budget, cost) < 1:
                hint = f"Set compare.{key} to {enough:g} or more, or lower arms.{owner.name}.fit.steps."
                errors.add(f"arms.{owner.name}", f"{what} within compare.{key} = {budget:g}", share, hint)
    errors.raise_if_any()


def _cost_before_runs(plan: ComparisonPlan, arm: Arm, small: ModelConfig) -> float:
    config, lagged = arm.config, bool(arm.lag)
    if arm.fitted:
        return fit_flops(config, small, lagged) + arm.lag * plan.step_flops
    fitted = fitted_arm_of(arm, plan.spec.arms)
    seq = plan.large.tokens_per_sample(config.data.seq_length)
    steps, _ = _fit_steps(config, small, bool(fitted.lag))
    return steps * train_flops(plan.large, config.fit.global_batch_size * seq, seq)


def _fit_steps(config: RunConfig, small: ModelConfig, lagged: bool) -> tuple[int, float]:
    """Returns (steps, FLOPs per step) within max_flops. Raises ConfigError if it pays for no step."""
    fit, operator = config.fit, build_initial_operator(small, config.large, config.operator)
    seq = operator.large.tokens_per_sample(config.data.seq_length)
    step = fit_step_flops(operator, fit.global_batch_size * seq, seq, fit.distill > 0, lagged)
    return limit_to_budget(fit, step).steps, step
