"""Plans what the runs of an arm start from: the small models, fits, growths and codes, and the controls' training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import SCRATCH, LargeSection, PretrainSection, RunConfig, SmallSection
from megatron_ligo.experiments.compare.comparison_config import WSD, Arm, ComparisonConfig, fitted_arm_of
from megatron_ligo.experiments.compare.run_folder import CODES, FIT, GROW, PRETRAIN, RUN, last_checkpoint
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from megatron_ligo.experiments.compare.trunk import decay_steps
from megatron_ligo.experiments.smaller_layout import with_smaller_layout
from megatron_ligo.training.initial_weights import read_model_config, scratch_model_config

GetResult = Callable[[ComparisonJob], dict | None]  # returns a job's result; None while there is none


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


class StartPlan:
    """The jobs before the runs. get_result: `jobs.run` runs missing jobs, `jobs.result` only looks them up."""

    def __init__(self, spec: ComparisonConfig, jobs: JobQueue, get_result: GetResult):
        self.spec, self.jobs, self.get_result = spec, jobs, get_result
        self.large: ModelConfig = scratch_model_config(spec.config)
        self.step_flops = self._step_flops(self.large)
        self.unit = spec.compare.scratch_steps * self.step_flops

    def source(self, arm: Arm | None = None, seed: int | None = None) -> dict | None:
        """Returns the small model that an arm grows at a seed of the comparison; None while it is untrained.

        {"path", "flops" (None: unknown), "loss", "steps", "seed"}. None: the first source, at compare.source_steps.
        """
        compare, config = self.spec.compare, self.spec.config
        if not compare.source_steps:
            return {"path": config.small.path, "flops": compare.source_flops, "loss": None, "steps": 0, "seed": 0}
        steps = (arm.source_steps if arm else 0) or compare.source_steps
        number = compare.seeds.index(seed) if seed in compare.seeds else 0
        source_seed = compare.source_seeds[number % len(compare.source_seeds)]
        run = replace(self._run(config.pretrain, steps), lr=compare.source_lr, seed=source_seed, start=SCRATCH)
        config = self._with_cache(replace(config, pretrain=run, large=no_sizes(config)))
        config = with_smaller_layout(config, self.small_model)
        name = f"source{f'_{steps}' * (steps != compare.source_steps)}{f'_seed_{source_seed}' * bool(source_seed)}"
        job = ComparisonJob(name, PRETRAIN, config, keep=True)
        result = self.get_result(job)
        if not result or "end" not in result["losses"]:
            return None
        path = last_checkpoint(self.jobs.folder_of(job))
        loss = result["losses"]["end"]
        return {"path": f"{path}", "flops": result["flops"], "loss": loss, "steps": steps, "seed": source_seed}

    def sources(self) -> list[dict]:
        """Returns every small model that is trained so far, the first one first."""
        arms = [None, *(arm for arm in self.spec.arms if arm.source_steps)]
        known = (self.source(arm, seed) for arm in arms for seed in self.spec.compare.seeds)
        return list({source["path"]: source for source in known if source}.values())

    def start(self, arm: Arm, seed: int, lr: float) -> ArmStart | None:
        """Returns the arm's start, producing it first if necessary; None if it is missing or diverged."""
        config = self._seeded(arm, seed)
        prefix = f"{arm.folder}/seed_{seed}"
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
        prefix = f"{arm.folder}/seed_{fit.seed}"
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

    @cached_property
    def small_step_flops(self) -> int:
        """FLOPs of a step of the small model, on as many samples."""
        return self._step_flops(self.small_model)

    @cached_property
    def small_model(self) -> ModelConfig:
        small = self.spec.config.small
        return read_model_config(Path(small.path), small.accept)

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

    def _seeded(self, arm: Arm, seed: int) -> RunConfig:
        """Returns the arm's config with one seed for everything, the small model's path and a shared sample cache."""
        config, source = arm.config, self.source(arm, seed)
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

    def tokens_per_step(self, model_config: ModelConfig) -> int:
        return self.spec.config.pretrain.global_batch_size * self._seq_length(model_config)

    def _step_flops(self, model_config: ModelConfig) -> int:
        return train_flops(model_config, self.tokens_per_step(model_config), self._seq_length(model_config))

    def _seq_length(self, model_config: ModelConfig) -> int:
        return model_config.tokens_per_sample(self.spec.config.data.seq_length)


def no_sizes(config: RunConfig) -> LargeSection:
    """Returns a [large] without sizes: the model keeps its own."""
    return replace(config.large, **dict.fromkeys(vars(config.large)))


def _small_at(path: str, config: RunConfig) -> SmallSection:
    """Returns [small] with a path; the format that the user names is that of the path that the user names."""
    small = config.small
    return small if path == small.path else replace(small, path=path, format="auto")
