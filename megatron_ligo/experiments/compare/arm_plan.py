"""What each arm is made of: which runs, from where, for how many steps, so that every arm costs the same FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import PretrainSection, RunConfig
from megatron_ligo.experiments.compare.comparison_config import Arm, CompareSection, ComparisonConfig, fitted_arm_of
from megatron_ligo.experiments.compare.run_folder import FIT, GROW, PRETRAIN, RUN, last_checkpoint
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from megatron_ligo.training.initial_weights import fresh_config

SMALL_SEED = 0
GetResult = Callable[[ComparisonJob], dict | None]  # a job's result; None where there is none (yet)


@dataclass(frozen=True)
class ArmStart:
    """Where an arm begins: a folder ("": fresh weights), what that cost in FLOPs, and how many samples it has read."""

    folder: str
    spent: float
    samples: int


@dataclass(frozen=True)
class FitResult:
    """What a fit has left. spent: FLOPs, its lag's among them; steps: those that it has done, whichever is kept."""

    operator: Path
    spent: float
    steps: int
    lag_samples: int


@dataclass(frozen=True)
class ArmRun:
    """One run of an arm. flops: the fit (or what stands for it) included. loss: None where it diverged."""

    seed: int
    budget: float
    lr: float
    steps: int
    flops: float
    spent: float
    begun: float | None
    loss: float | None


class ComparisonPlan:
    """The jobs of a comparison and their order. obtain: `jobs.run` does what is missing, `jobs.result` only looks."""

    def __init__(self, spec: ComparisonConfig, jobs: JobQueue, obtain: GetResult):
        self.spec, self.jobs, self.obtain = spec, jobs, obtain
        self.large: ModelConfig = fresh_config(spec.config)
        self.step_flops = self._step_flops(self.large)
        self.unit = spec.compare.scratch_steps * self.step_flops

    def source(self) -> dict | None:
        """The small model: {"path", "flops" (None: unknown), "loss"}; None while it is not trained."""
        compare, config = self.spec.compare, self.spec.config
        if not compare.source_steps:
            return {"path": config.small.path, "flops": compare.source_flops, "loss": None}
        run = replace(self._run(config.pretrain, compare.source_steps), lr=compare.source_lr, seed=SMALL_SEED)
        sizes = replace(config.large, **dict.fromkeys(vars(config.large)))
        job = ComparisonJob("source", PRETRAIN, self._with_cache(replace(config, pretrain=run, large=sizes)), keep=True)
        found = self.obtain(job)
        if not found or "end" not in found["losses"]:
            return None
        path = last_checkpoint(self.jobs.place(job))
        return {"path": f"{path}", "flops": found["flops"], "loss": found["losses"]["end"]}

    def tune(self, arm: Arm) -> dict[float, ArmRun]:
        """The tries of an arm, by their rate; none where there is one rate to choose from."""
        compare = self.spec.compare
        if len(compare.lrs) == 1:
            return {}
        tries = {lr: self.train(arm, compare.tune_seed, compare.tune_budget, lr, tuning=True) for lr in compare.lrs}
        return {lr: found for lr, found in tries.items() if found}

    def train(self, arm: Arm, seed: int, budget: float, lr: float, tuning: bool = False) -> ArmRun | None:
        """One run; None where it is not there, or where its start costs more than the budget."""
        start = self.start(arm, seed, lr)
        if start is None:
            return None
        steps = self.steps(budget, start.spent)
        if steps < 1:
            return None
        config = self._seeded(arm.config, seed)
        run = replace(
            self._run(config.pretrain, steps), lr=lr, start=start.folder, first_sample=start.samples, grown_peak=1.0
        )
        valid = (self.spec.compare.tune_valid if tuning else ()) or config.data.valid
        config = replace(config, pretrain=run, data=replace(config.data, valid=valid))
        found = self.obtain(
            ComparisonJob(f"{arm.name}/seed_{seed}/{'try' if tuning else 'run'}_{budget:g}_{lr:g}", PRETRAIN, config)
        )
        if found is None:
            return None
        losses = found["losses"]
        flops = start.spent + steps * self.step_flops
        loss = losses.get("end")
        loss = loss if loss is not None and math.isfinite(loss) else None
        return ArmRun(seed, budget, lr, steps, flops, start.spent, losses.get("start"), loss)

    def start(self, arm: Arm, seed: int, lr: float) -> ArmStart | None:
        """Where the arm begins, made if need be."""
        if not arm.grown:
            return ArmStart("", 0.0, 0)
        config = self._seeded(arm.config, seed)
        place = f"{arm.name}/seed_{seed}"
        operator, spent, samples = None, 0.0, 0
        if arm.fitted:
            fitted = self._fit(arm, config, place, lr)
            if fitted is None:
                return None
            operator, spent = fitted.operator, fitted.spent
            # A lag has been trained on what comes after all that the fit may read.
            read = config.fit.steps if arm.lag else fitted.steps
            samples = read * config.fit.global_batch_size + fitted.lag_samples
            if arm.lag:
                place = f"{place}/of_{lr:g}"
        job = ComparisonJob(f"{place}/grown", GROW, config, operator)
        if self.obtain(job) is None:
            return None
        start = ArmStart(f"{self.jobs.place(job) / RUN}", spent, samples)
        return self._fully_trained(arm, config, start, lr) if arm.full else start

    def _fit(self, arm: Arm, config: RunConfig, place: str, lr: float) -> FitResult | None:
        lag = self._lag(arm, config, place, lr) if arm.lag else ArmStart("", 0.0, 0)
        if lag is None:
            return None
        name = f"{place}/fit_{lr:g}" if arm.lag else f"{place}/fit"
        job = ComparisonJob(name, FIT, replace(config, fit=replace(config.fit, lag=lag.folder)))
        found = self.obtain(job)
        if not found or not found["losses"]:
            return None
        operator = self.jobs.place(job) / RUN / "operator"
        return FitResult(operator, found["flops"] + lag.spent, found["step"], lag.samples)

    def _lag(self, arm: Arm, config: RunConfig, place: str, lr: float) -> ArmStart | None:
        """Some training of the start, on what comes after the fit's samples."""
        job = ComparisonJob(f"{place}/start", GROW, config)
        if self.obtain(job) is None:
            return None
        first = config.fit.steps * config.fit.global_batch_size
        run = replace(self._run(config.pretrain, arm.lag), lr=lr, start=f"{self.jobs.place(job) / RUN}")
        run = replace(run, first_sample=first, grown_peak=1.0)
        job = ComparisonJob(f"{place}/lag_{lr:g}", PRETRAIN, replace(config, pretrain=run), keep=True)
        found = self.obtain(job)
        if not found or not found["losses"]:
            return None
        return ArmStart(f"{last_checkpoint(self.jobs.place(job))}", found["flops"], arm.lag * run.global_batch_size)

    def _fully_trained(self, arm: Arm, config: RunConfig, start: ArmStart, lr: float) -> ArmStart | None:
        """The grown model after all its weights were trained on the batches that a fit has read, as a fit would."""
        fit, steps = config.fit, self._steps_of_fit(arm, config, lr)
        if steps is None:
            return None
        same = {key: getattr(fit, key) for key in ("global_batch_size", "micro_batch_size", "schedule", "warmup_steps")}
        run = replace(config.pretrain, **same, steps=steps, lr=lr, start=start.folder, grown_peak=1.0)
        place = f"{arm.name}/seed_{fit.seed}"
        job = ComparisonJob(f"{place}/full_{lr:g}", PRETRAIN, replace(config, pretrain=self._plain(run)), keep=True)
        found = self.obtain(job)
        if not found or not found["losses"]:
            return None
        # The batches of a full control cost the large model's own FLOPs.
        return ArmStart(f"{last_checkpoint(self.jobs.place(job))}", found["flops"], steps * fit.global_batch_size)

    def _steps_of_fit(self, arm: Arm, config: RunConfig, lr: float) -> int | None:
        """Of the fit that a full control stands beside; None while one that may end early is not done."""
        if config.fit.max_flops is None and not config.fit.patience:
            return config.fit.steps
        beside = fitted_arm_of(arm, self.spec.arms)
        fitted = self._fit(beside, config, f"{beside.name}/seed_{config.fit.seed}", lr)
        return fitted.steps if fitted else None

    def begun(self, arm: Arm) -> bool:
        return (self.jobs.folder / arm.name).exists()

    def steps(self, budget: float, spent: float) -> int:
        """How many steps a budget leaves after what a start has cost."""
        return round((budget * self.unit - spent) / self.step_flops)

    def _run(self, run: PretrainSection, steps: int) -> PretrainSection:
        return self._plain(replace(run, steps=steps, warmup_steps=round(self.spec.compare.warmup * steps)))

    @staticmethod
    def _plain(run: PretrainSection) -> PretrainSection:
        return replace(run, keep_last=1)

    def _seeded(self, config: RunConfig, seed: int) -> RunConfig:
        """The run's config with one seed for everything, the small model where it is, and one cache of samples."""
        source = self.source()
        small = replace(config.small, path=source["path"]) if source else config.small
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
        seq = model_config.tokens_of_sample(config.data.seq_length)
        return train_flops(model_config, config.pretrain.global_batch_size * seq, seq)


def best_rate(tries: dict[float, ArmRun]) -> float | None:
    """The rate of the lowest loss; None where every try diverged."""
    ended = {lr: tried.loss for lr, tried in tries.items() if tried.loss is not None}
    return min(ended, key=ended.__getitem__) if ended else None


def planned_runs(compare: CompareSection, arm: Arm) -> list[tuple[int, float]]:
    """(seed, budget) of each run of an arm; scratch's full budget is always one of them."""
    budgets = sorted({*compare.budgets, *(() if arm.grown else (1.0,))})
    return [(seed, budget) for seed in compare.seeds for budget in budgets]


def run_arm(plan: ComparisonPlan, arm: Arm) -> dict:
    """An arm's tries and its runs at every seed and budget: {"tries", "lr", "runs"}."""
    compare = plan.spec.compare
    tries = plan.tune(arm)
    lr = compare.lrs[0] if len(compare.lrs) == 1 else best_rate(tries)
    runs = []
    if lr is not None:
        made = (plan.train(arm, seed, budget, lr) for seed, budget in planned_runs(compare, arm))
        runs = [run for run in made if run]
    return {"tries": tries, "lr": lr, "runs": runs}


def jobs_folder(folder: Path) -> Path:
    """Where the runs are: absolute, so that a job's settings do not depend on the place it is started from."""
    return folder.resolve() / "jobs"
