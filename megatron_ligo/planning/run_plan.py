"""The plan of a whole run: the fit and the pretraining that a config describes, and the text of both."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.planning import layout_search, plan_text
from megatron_ligo.planning.planned_job import PlannedJob
from megatron_ligo.training.initial_weights import read_small_config


@dataclass(frozen=True)
class RunPlan:
    """A run on `world_size` devices of `device_bytes` memory, each doing `flops_per_second` in the run's precision.

    `str()` gives the text that the command prints.
    """

    config: RunConfig
    fit: PlannedJob
    pretrain: PlannedJob
    device_bytes: float
    flops_per_second: float

    def __str__(self) -> str:
        config, speed, memory = self.config, self.flops_per_second, self.device_bytes
        pages = [
            plan_text.describe_models(self.fit.operator),
            plan_text.describe_run("fit", self.fit, speed, memory),
            plan_text.describe_growth(self.fit.operator, config.handoff.formats, config.handoff.dtype),
            plan_text.describe_run("pretraining", self.pretrain, speed, memory),
            plan_text.describe_checkpoints(self.fit.operator, config.pretrain.precision),
        ]
        return "\n\n".join("\n".join(page) for page in pages)

    @property
    def is_valid(self) -> bool:
        """True if the processes can be laid out as the config says, in both jobs."""
        return not any(layout_search.find_problems(job) for job in (self.fit, self.pretrain))

    def describe_refused_layouts(self) -> str:
        """Returns the layouts that do not work, with reasons, as text."""
        jobs = (("fit", self.fit), ("pretraining", self.pretrain))
        return "\n\n".join("\n".join(plan_text.describe_refused_layouts(name, job)) for name, job in jobs)


def plan_run(
    config: RunConfig,
    world_size: int,
    device_bytes: float,
    flops_per_second: float,
    small: ModelConfig | None = None,
) -> RunPlan:
    """Plans the fit and the pretraining that a config describes. Raises LigoError for sizes that cannot be grown.

    small: the small model's sizes; None: they are read from [small].
    """
    operator = build_initial_operator(small or read_small_config(config), config.large, config.operator)
    seq_length = operator.large.tokens_per_sample(config.data.seq_length)
    fit_only = {"distilled": config.fit.distill > 0, "lagged": bool(config.fit.lag)}
    fit = PlannedJob(
        operator.large, config.fit, world_size, seq_length, operator, config.fit.source == "whole", **fit_only
    )
    pretrain = replace(fit, training=config.pretrain, operator=None, **dict.fromkeys(fit_only, False))
    return RunPlan(config, fit, pretrain, device_bytes, flops_per_second)
