"""Plans the runs of each arm: their starts and steps, so that every arm costs the same FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.comparison_config import WSD, Arm, CompareSection
from megatron_ligo.experiments.compare.run_folder import PRETRAIN
from megatron_ligo.experiments.compare.run_queue import ComparisonJob
from megatron_ligo.experiments.compare.start_plan import StartPlan, no_sizes
from megatron_ligo.experiments.compare.trunk import branch_jobs
from megatron_ligo.experiments.smaller_layout import with_smaller_layout

Steps = Callable[[float], int]  # returns the steps that a budget pays for


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm.

    flops: in total, of which `spent` before the run (a fit, or full training in its place). begun, loss: held-out loss
    at step 0 and at the end; loss is None if the run diverged. curve: (FLOPs, smoothed training loss) over the run.
    evaluations: (FLOPs, held-out loss) along the run. sample_losses: the loss at the end on each held-out sample; empty
    if it was not measured. source_loss: the loss at the end on compare.source_valid. tokens: read by the run itself.
    """

    seed: int
    budget: float
    lr: float
    steps: int
    flops: float
    spent: float
    begun: float | None
    loss: float | None
    curve: tuple[tuple[float, float], ...] = ()
    evaluations: tuple[tuple[float, float], ...] = ()
    sample_losses: tuple[float, ...] = ()
    source_loss: float | None = None
    tokens: int = 0


class ComparisonPlan(StartPlan):
    """The jobs of a comparison in order."""

    def tune(self, arm: Arm) -> dict[float, ArmRun]:
        """Runs an arm's tuning runs and returns them by rate; empty if there is a single rate."""
        compare = self.spec.compare
        if len(compare.lrs) == 1:
            return {}
        return try_rates(compare.lrs, compare.extend_lrs, partial(self._try, arm))

    def tune_fit(self, arm: Arm) -> dict[float, ArmRun]:
        """Returns the best tuning run of each rate of the fit, by rate; empty if there is a single one."""
        compare = self.spec.compare
        if not (arm.fitted and compare.fit_lrs):
            return {}

        def run_best(fit_lr: float) -> ArmRun | None:
            fitted = with_fit_rate(arm, fit_lr)
            tries = self.tune(fitted) or {compare.lrs[0]: self._try(fitted, compare.lrs[0])}
            return tries.get(best_rate(tries)) or next(iter(tries.values()), None)

        return try_rates(compare.fit_lrs, compare.extend_lrs, run_best)

    def _try(self, arm: Arm, lr: float) -> ArmRun | None:
        return self.train(arm, self.spec.compare.tune_seed, self.spec.compare.tune_budget, lr, tuning=True)

    def train(self, arm: Arm, seed: int, budget: float, lr: float, tuning: bool = False) -> ArmRun | None:
        """Returns one run; None if it is missing or its start costs more than the budget."""
        config = self._seeded(arm, seed)
        if arm.small:
            config = with_smaller_layout(replace(config, large=no_sizes(config)), self.small_model)
        start = self.start(arm, seed, lr)
        if start is None:
            return None
        step_flops = self.small_step_flops if arm.small else self.step_flops
        steps_of = partial(self._steps, spent=start.spent, step_flops=step_flops)
        steps = steps_of(budget)
        if steps < 1:
            return None
        run = replace(self._run(config.pretrain, steps), lr=lr, start=start.folder, first_sample=start.samples)
        if run.schedule == WSD:
            # All budgets share the warm-up, as they share the trunk.
            run = replace(run, warmup_steps=self._warmup_steps(max(steps_of(min(self.spec.compare.budgets)), 0)))
        run = replace(run, grown_peak=1.0, codes=start.codes)
        valid = (self.spec.compare.tune_valid if tuning else ()) or config.data.valid
        config = replace(config, pretrain=run, data=replace(config.data, valid=valid))
        result = self._last_result(f"{arm.folder}/seed_{seed}", config, budget, steps_of, tuning)
        if result is None:
            return None
        losses = result["losses"]
        flops = start.spent + steps * step_flops
        loss = losses.get("end")
        loss = loss if loss is not None and math.isfinite(loss) else None
        curve, evaluations = (
            tuple((start.spent + at, value) for at, value in result.get(key, ())) for key in ("curve", "evaluations")
        )
        run = ArmRun(seed, budget, lr, steps, flops, start.spent, losses.get("start"), loss, curve, evaluations)
        tokens = steps * self.tokens_per_step(self.large)
        by_sample = tuple(result.get("sample_losses", ()))
        return replace(run, sample_losses=by_sample, source_loss=result.get("source_loss"), tokens=tokens)

    def _last_result(self, prefix: str, config: RunConfig, budget: float, steps: Steps, tuning: bool) -> dict | None:
        """Returns the result of a run of one budget; {"losses": {}} if it, or the trunk before it, diverged."""
        run, other = config.pretrain, self.spec.compare.source_valid
        if tuning:
            return self.get_result(ComparisonJob(f"{prefix}/try_{budget:g}_{run.lr:g}", PRETRAIN, config))
        if run.schedule != WSD:
            return self.get_result(
                ComparisonJob(f"{prefix}/run_{budget:g}_{run.lr:g}", PRETRAIN, config, other_valid=other)
            )
        shorter = {each: steps(each) for each in self.spec.compare.budgets if each < budget and steps(each) > 0}
        result = None
        for job in branch_jobs(prefix, config, {**shorter, budget: steps(budget)}, self.spec.compare.decay, other):
            result = self.get_result(job)
            if not result or not result["losses"]:
                break
        return result

    def begun(self, arm: Arm) -> bool:
        return (self.jobs.folder / arm.folder).exists()

    def steps(self, budget: float, spent: float) -> int:
        """Returns the large model's steps that a budget leaves after the cost of the start."""
        return self._steps(budget, spent, self.step_flops)

    def _steps(self, budget: float, spent: float, step_flops: float) -> int:
        return round((budget * self.unit - spent) / step_flops)


def try_rates(rates: Sequence[float], extend: int, trial: Callable[[float], ArmRun | None]) -> dict[float, ArmRun]:
    """Tries each rate, and then up to `extend` rates beyond the better edge while the best is at one."""
    tries = {rate: trial(rate) for rate in rates}
    step = {min(rates): 0.5, max(rates): 2.0}
    for _ in range(extend):
        best = best_rate({rate: run for rate, run in tries.items() if run})
        if best not in step or best not in (min(tries), max(tries)):
            break
        beyond = best * step[best]
        step[beyond] = step[best]
        tries[beyond] = trial(beyond)
    return {rate: run for rate, run in tries.items() if run}


def with_fit_rate(arm: Arm, fit_lr: float) -> Arm:
    """Returns the arm with another peak rate of its fit, and a folder of its own."""
    config = replace(arm.config, fit=replace(arm.config.fit, lr=fit_lr))
    return replace(arm, config=config, variant=f"fit_{fit_lr:g}")


def best_rate(tries: dict[float, ArmRun]) -> float | None:
    """Returns the rate with the lowest loss; None if every tuning run diverged."""
    ended = {lr: run.loss for lr, run in tries.items() if run.loss is not None}
    return min(ended, key=ended.__getitem__) if ended else None


def planned_runs(compare: CompareSection, arm: Arm) -> list[tuple[int, float]]:
    """Returns (seed, budget) of each run of an arm; scratch always runs its full budget."""
    budgets = sorted({*compare.budgets, *(() if arm.grown else (1.0,))})
    return [(seed, budget) for seed in compare.seeds for budget in budgets]


def run_arm(plan: ComparisonPlan, arm: Arm) -> dict:
    """Runs an arm's tuning and its runs at every seed and budget: {"tries", "lr", "fit_tries", "fit_lr", "runs"}."""
    compare = plan.spec.compare
    fit_tries = plan.tune_fit(arm)
    fit_lr = best_rate(fit_tries)
    nothing_ended = arm.fitted and bool(compare.fit_lrs) and fit_lr is None
    if fit_lr is not None:
        arm = with_fit_rate(arm, fit_lr)
    tries = {} if nothing_ended else plan.tune(arm)
    lr = compare.lrs[0] if len(compare.lrs) == 1 else best_rate(tries)
    lr = None if nothing_ended else lr
    runs = []
    if lr is not None:
        planned = (plan.train(arm, seed, budget, lr) for seed, budget in planned_runs(compare, arm))
        runs = [run for run in planned if run]
    return {"tries": tries, "lr": lr, "fit_tries": fit_tries, "fit_lr": fit_lr, "runs": runs}


def jobs_folder(folder: Path) -> Path:
    """Returns the jobs' folder as an absolute path: a job's settings must not depend on the current directory."""
    return folder.resolve() / "jobs"
