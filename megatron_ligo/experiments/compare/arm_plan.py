"""Plans the runs of each arm: their starts and steps, so that every arm costs the same FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import SCRATCH, LargeSection, PretrainSection, RunConfig, SmallSection
from megatron_ligo.experiments.compare.comparison_config import (
    WSD,
    Arm,
    CompareSection,
    ComparisonConfig,
    fitted_arm_of,
)
from megatron_ligo.experiments.compare.run_folder import CODES, FIT, GROW, PRETRAIN, RUN, last_checkpoint
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from megatron_ligo.experiments.compare.trunk import branch_jobs, decay_steps
from megatron_ligo.training.initial_weights import read_model_config, scratch_model_config

SMALL_SEED = 0
GetResult = Callable[[ComparisonJob], dict | None]  # returns a job's result; None while there is none
Steps = Callable[[float], int]  # returns the steps that a budget pays for


@dataclass(frozen=True)
class ArmStart:
    """The start of an arm's training. folder: SCRATCH: fresh weights. spent, samples: FLOPs and samples used so far.

    codes: the folder of the token codes that fresh weights embed, or "".
    """

    folder: str
    spent: float
    samples: int
    codes: str = ""


@dataclass(frozen=True)
class FitResult:
    """The result of a fit. spent: FLOPs, including its lag's; steps: all steps done, whichever operator is kept."""

    operator: Path
    spent: float
    steps: int
    lag_samples: int


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm.

    flops: in total, of which `spent` before the run (a fit, or full training in its place). begun, loss: held-out loss
    at step 0 and at the end; loss is None if the run diverged. curve: (FLOPs, smoothed training loss) over the run.
    evaluations: (FLOPs, held-out loss) along the run. sample_losses: the loss at the end on each held-out sample; empty
    if it was not measured.
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


class ComparisonPlan:
    """The jobs of a comparison in order. get_result: `jobs.run` runs missing jobs, `jobs.result` only looks them up."""

    def __init__(self, spec: ComparisonConfig, jobs: JobQueue, get_result: GetResult):
        self.spec, self.jobs, self.get_result = spec, jobs, get_result
        self.large: ModelConfig = scratch_model_config(spec.config)
        self.step_flops = self._step_flops(self.large)
        self.unit = spec.compare.scratch_steps * self.step_flops

    def source(self) -> dict | None:
        """Returns the small model: {"path", "flops" (None: unknown), "loss"}; None while it is untrained."""
        compare, config = self.spec.compare, self.spec.config
        if not compare.source_steps:
            return {"path": config.small.path, "flops": compare.source_flops, "loss": None}
        run = replace(self._run(config.pretrain, compare.source_steps), lr=compare.source_lr, seed=SMALL_SEED)
        run = replace(run, start=SCRATCH)
        config = self._with_cache(replace(config, pretrain=run, large=_no_sizes(config)))
        job = ComparisonJob("source", PRETRAIN, config, keep=True)
        result = self.get_result(job)
        if not result or "end" not in result["losses"]:
            return None
        path = last_checkpoint(self.jobs.folder_of(job))
        return {"path": f"{path}", "flops": result["flops"], "loss": result["losses"]["end"]}

    def tune(self, arm: Arm) -> dict[float, ArmRun]:
        """Runs an arm's tuning runs and returns them by rate; empty if there is a single rate."""
        compare = self.spec.compare
        if len(compare.lrs) == 1:
            return {}
        tries = {lr: self.train(arm, compare.tune_seed, compare.tune_budget, lr, tuning=True) for lr in compare.lrs}
        step = {min(compare.lrs): 0.5, max(compare.lrs): 2.0}
        for _ in range(compare.extend_lrs):
            best = best_rate({lr: run for lr, run in tries.items() if run})
            if best not in step or best not in (min(tries), max(tries)):
                break
            beyond = best * step[best]
            step[beyond] = step[best]
            tries[beyond] = self.train(arm, compare.tune_seed, compare.tune_budget, beyond, tuning=True)
        return {lr: run for lr, run in tries.items() if run}

    def train(self, arm: Arm, seed: int, budget: float, lr: float, tuning: bool = False) -> ArmRun | None:
        """Returns one run; None if it is missing or its start costs more than the budget."""
        config = self._seeded(arm.config, seed)
        if arm.small:
            config = replace(config, large=_no_sizes(config))
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
        result = self._last_result(f"{arm.name}/seed_{seed}", config, budget, steps_of, tuning)
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
        return replace(run, sample_losses=tuple(result.get("sample_losses", ())))

    def _last_result(self, prefix: str, config: RunConfig, budget: float, steps: Steps, tuning: bool) -> dict | None:
        """Returns the result of a run of one budget; {"losses": {}} if it, or the trunk before it, diverged."""
        run = config.pretrain
        if tuning:
            return self.get_result(ComparisonJob(f"{prefix}/try_{budget:g}_{run.lr:g}", PRETRAIN, config))
        if run.schedule != WSD:
            return self.get_result(ComparisonJob(f"{prefix}/run_{budget:g}_{run.lr:g}", PRETRAIN, config))
        shorter = {each: steps(each) for each in self.spec.compare.budgets if each < budget and steps(each) > 0}
        result = None
        for job in branch_jobs(prefix, config, {**shorter, budget: steps(budget)}, self.spec.compare.decay):
            result = self.get_result(job)
            if not result or not result["losses"]:
                break
        return result

    def start(self, arm: Arm, seed: int, lr: float) -> ArmStart | None:
        """Returns the arm's start, producing it first if necessary; None if it is missing or diverged."""
        config = self._seeded(arm.config, seed)
        prefix = f"{arm.name}/seed_{seed}"
        operator, spent, samples = None, 0.0, 0
        if arm.small:
            return ArmStart(config.small.path, 0.0, 0)
        if arm.codes:
            start = RunConfig().pretrain.start if arm.grown else SCRATCH
            job = ComparisonJob(
                f"{prefix}/codes", CODES, replace(config, pretrain=replace(config.pretrain, start=start))
            )
            result = self.get_result(job)
            if result is None:
                return None
            codes, spent = f"{self.jobs.folder_of(job) / RUN}", result["flops"]
            if not arm.grown:
                return ArmStart(SCRATCH, spent, 0, codes)
            config = replace(config, operator=replace(config.operator, codes=codes))
        if not arm.grown:
            return ArmStart(SCRATCH, 0.0, 0)
        if arm.fitted:
            fitted = self._fit(arm, config, prefix, lr)
            if fitted is None:
                return None
            operator, spent = fitted.operator, spent + fitted.spent
            # The lag's training reads the samples after all those that the fit may read.
            steps_read = config.fit.steps if arm.lag else fitted.steps
            samples = steps_read * config.fit.global_batch_size + fitted.lag_samples
            if arm.lag:
                prefix = f"{prefix}/of_{lr:g}"
        job = ComparisonJob(f"{prefix}/grown", GROW, config, operator)
        if self.get_result(job) is None:
            return None
        start = ArmStart(f"{self.jobs.folder_of(job) / RUN}", spent, samples)
        return self._fully_trained(arm, config, start, lr) if arm.full else start

    def _fit(self, arm: Arm, config: RunConfig, prefix: str, lr: float) -> FitResult | None:
        lag = self._lag(arm, config, prefix, lr) if arm.lag else ArmStart("", 0.0, 0)
        if lag is None:
            return None
        name = f"{prefix}/fit_{lr:g}" if arm.lag else f"{prefix}/fit"
        job = ComparisonJob(name, FIT, replace(config, fit=replace(config.fit, lag=lag.folder)))
        result = self.get_result(job)
        if not result or not result["losses"]:
            return None
        operator = self.jobs.folder_of(job) / RUN / "operator"
        return FitResult(operator, result["flops"] + lag.spent, result["step"], lag.samples)

    def _lag(self, arm: Arm, config: RunConfig, prefix: str, lr: float) -> ArmStart | None:
        """Trains the start for the lag's steps on the samples after the fit's."""
        job = ComparisonJob(f"{prefix}/start", GROW, config)
        if self.get_result(job) is None:
            return None
        first = config.fit.steps * config.fit.global_batch_size
        run = replace(self._run(config.pretrain, arm.lag), lr=lr, start=f"{self.jobs.folder_of(job) / RUN}")
        run = replace(run, first_sample=first, grown_peak=1.0)
        job = ComparisonJob(f"{prefix}/lag_{lr:g}", PRETRAIN, replace(config, pretrain=run), keep=True)
        result = self.get_result(job)
        if not result or not result["losses"]:
            return None
        return ArmStart(
            f"{last_checkpoint(self.jobs.folder_of(job))}", result["flops"], arm.lag * run.global_batch_size
        )

    def _fully_trained(self, arm: Arm, config: RunConfig, start: ArmStart, lr: float) -> ArmStart | None:
        """Trains all weights of the grown model on the fit's batches, with the fit's schedule."""
        fit, steps = config.fit, self._steps_of_fit(arm, config, lr)
        if steps is None:
            return None
        keys = ("global_batch_size", "micro_batch_size", "schedule", "decay_steps", "warmup_steps")
        same = {key: getattr(fit, key) for key in keys}
        run = replace(config.pretrain, **same, steps=steps, lr=lr, start=start.folder, grown_peak=1.0)
        prefix = f"{arm.name}/seed_{fit.seed}"
        job = ComparisonJob(
            f"{prefix}/full_{lr:g}", PRETRAIN, replace(config, pretrain=self._keep_one_checkpoint(run)), keep=True
        )
        result = self.get_result(job)
        if not result or not result["losses"]:
            return None
        # Full training costs the large model's FLOPs.
        spent, samples = start.spent + result["flops"], steps * fit.global_batch_size
        return ArmStart(f"{last_checkpoint(self.jobs.folder_of(job))}", spent, samples)

    def _steps_of_fit(self, arm: Arm, config: RunConfig, lr: float) -> int | None:
        """Returns the steps of the fit that a control matches; None while a fit that may end early is unfinished."""
        if config.fit.max_flops is None and not config.fit.patience:
            return config.fit.steps
        fitted_arm = fitted_arm_of(arm, self.spec.arms)
        fitted = self._fit(fitted_arm, config, f"{fitted_arm.name}/seed_{config.fit.seed}", lr)
        return fitted.steps if fitted else None

    def begun(self, arm: Arm) -> bool:
        return (self.jobs.folder / arm.name).exists()

    def steps(self, budget: float, spent: float) -> int:
        """Returns the large model's steps that a budget leaves after the cost of the start."""
        return self._steps(budget, spent, self.step_flops)

    def _steps(self, budget: float, spent: float, step_flops: float) -> int:
        return round((budget * self.unit - spent) / step_flops)

    @cached_property
    def small_step_flops(self) -> int:
        """FLOPs of a step of the small model, on as many samples."""
        small = self.spec.config.small
        return self._step_flops(read_model_config(Path(small.path), small.accept))

    def _run(self, run: PretrainSection, steps: int) -> PretrainSection:
        run = replace(run, steps=steps, warmup_steps=self._warmup_steps(steps))
        if run.schedule == WSD:
            run = replace(run, decay_steps=decay_steps(steps, self.spec.compare.decay))
        return self._keep_one_checkpoint(run)

    def _warmup_steps(self, steps: int) -> int:
        return round(self.spec.compare.warmup * steps)

    @staticmethod
    def _keep_one_checkpoint(run: PretrainSection) -> PretrainSection:
        return replace(run, keep_last=1)

    def _seeded(self, config: RunConfig, seed: int) -> RunConfig:
        """Returns the config with one seed for everything, the small model's path and a shared sample cache."""
        source = self.source()
        small = _small_at(source["path"], config) if source else config.small
        return self._with_cache(
            replace(
                config,
                small=small,
                operator=replace(config.operator, seed=seed),
                fit=replace(config.fit, seed=seed),
                pretrain=replace(config.pretrain, seed=seed),
                handoff=replace(config.handoff, formats=("universal",)),
                data=replace(config.data, seed=seed),
            )
        )

    def _with_cache(self, config: RunConfig) -> RunConfig:
        return replace(
            config, data=replace(config.data, cache=config.data.cache or f"{self.jobs.folder / 'data_cache'}")
        )

    def _step_flops(self, model_config: ModelConfig) -> int:
        config = self.spec.config
        seq = model_config.tokens_per_sample(config.data.seq_length)
        return train_flops(model_config, config.pretrain.global_batch_size * seq, seq)


def _no_sizes(config: RunConfig) -> LargeSection:
    """Returns a [large] without sizes: the model keeps its own."""
    return replace(config.large, **dict.fromkeys(vars(config.large)))


def _small_at(path: str, config: RunConfig) -> SmallSection:
    """Returns [small] with a path; the format that the user names is that of the path that the user names."""
    small = config.small
    return small if path == small.path else replace(small, path=path, format="auto")


def best_rate(tries: dict[float, ArmRun]) -> float | None:
    """Returns the rate with the lowest loss; None if every tuning run diverged."""
    ended = {lr: run.loss for lr, run in tries.items() if run.loss is not None}
    return min(ended, key=ended.__getitem__) if ended else None


def planned_runs(compare: CompareSection, arm: Arm) -> list[tuple[int, float]]:
    """Returns (seed, budget) of each run of an arm; scratch always runs its full budget."""
    budgets = sorted({*compare.budgets, *(() if arm.grown else (1.0,))})
    return [(seed, budget) for seed in compare.seeds for budget in budgets]


def run_arm(plan: ComparisonPlan, arm: Arm) -> dict:
    """Runs an arm's tuning and its runs at every seed and budget: {"tries", "lr", "runs"}."""
    compare = plan.spec.compare
    tries = plan.tune(arm)
    lr = compare.lrs[0] if len(compare.lrs) == 1 else best_rate(tries)
    runs = []
    if lr is not None:
        planned = (plan.train(arm, seed, budget, lr) for seed, budget in planned_runs(compare, arm))
        runs = [run for run in planned if run]
    return {"tries": tries, "lr": lr, "runs": runs}


def jobs_folder(folder: Path) -> Path:
    """Returns the jobs' folder as an absolute path: a job's settings must not depend on the current directory."""
    return folder.resolve() / "jobs"
