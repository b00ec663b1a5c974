"""Runs of several budgets that branch off one run at a constant rate (pretrain.schedule = wsd)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.run_folder import PRETRAIN
from megatron_ligo.experiments.compare.run_queue import ComparisonJob


def branch_jobs(
    prefix: str, config: RunConfig, steps: Mapping[float, int], decay: float, other_valid: tuple[str | float, ...] = ()
) -> list[ComparisonJob]:
    """Returns the trunk's parts in order, each the extension of the one before, and then the branch that decays.

    config: the settings of the branch. steps: by budget, of the branch and of all shorter ones. other_valid: of the
    branch's job. The last job ends as a run that was as long from its start does.
    """
    run, jobs, trunk = config.pretrain, [], ""
    for budget in sorted(steps):
        constant = replace(run, steps=steps[budget] - decay_steps(steps[budget], decay), decay_steps=0)
        name = f"{prefix}/trunk_{budget:g}_{run.lr:g}"
        jobs.append(ComparisonJob(name, PRETRAIN, replace(config, pretrain=constant), keep=True, continues=trunk))
        trunk = name
    name = f"{prefix}/run_{max(steps):g}_{run.lr:g}"
    return [*jobs, ComparisonJob(name, PRETRAIN, config, continues=trunk, other_valid=other_valid)]


def decay_steps(steps: int, decay: float) -> int:
    return round(decay * steps)
