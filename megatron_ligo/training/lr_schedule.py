"""The learning rate as a function of the step alone, so that a resumed run goes on as if nothing had been."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_ligo.config.run_config import PretrainSection, TrainingSection


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


def schedule_after_growth(run: PretrainSection) -> PretrainSection:
    """A run's settings from a grown start: warmed up anew, to a part of the rate that a scratch run takes.

    On small models any part from a third to nine tenths of scratch's best peak ended within 0.003 of the best; at the
    whole of it the grown model lost what it had. A warm-up of 50 of 800 steps and none at all ended alike.
    """
    peak = run.lr * run.grown_peak
    warmup = run.warmup_steps if run.grown_warmup_steps is None else run.grown_warmup_steps
    return replace(run, lr=peak, min_lr=min(run.min_lr, peak), warmup_steps=warmup)
