"""The learning rate as a function of the step alone, so that a resumed run goes on as if nothing had been."""

from __future__ import annotations

import math

from megatron_ligo.config import TrainingSection


def learning_rate(run: TrainingSection, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up that reaches lr at its last step, then the schedule, which
    reaches min_lr at the run's last step."""
    if step < run.warmup_steps:
        return run.lr * (step + 1) / run.warmup_steps
    if run.schedule == "constant":
        return run.lr
    left = max(run.steps - 1 - run.warmup_steps, 1)
    done = min((step - run.warmup_steps) / left, 1.0)
    share = 1.0 - done if run.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return run.min_lr + (run.lr - run.min_lr) * share
