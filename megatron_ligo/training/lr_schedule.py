"""The learning rate as a function of the step alone, so that a resumed run repeats it."""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_ligo.config.run_config import PretrainSection, TrainingSection


def learning_rate(section: TrainingSection, step: int) -> float:
    """Returns the learning rate of a step, counted from 0.

    A linear warm-up reaches lr at its last step; the schedule then reaches min_lr at the run's last step. `wsd`
    keeps lr until the last `decay_steps` steps, so that runs of all lengths share one trunk.
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    if section.schedule == "wsd":
        left = section.steps - 1 - step
        share = min(left / section.decay_steps, 1.0) if section.decay_steps else 1.0
        return section.min_lr + (section.lr - section.min_lr) * share
    schedule_steps = max(section.steps - 1 - section.warmup_steps, 1)
    progress = min((step - section.warmup_steps) / schedule_steps, 1.0)
    scale = 1.0 - progress if section.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_lr + (section.lr - section.min_lr) * scale


def schedule_after_growth(section: PretrainSection) -> PretrainSection:
    """Returns the section for a grown start: its own warm-up, and a fraction of the peak rate of a scratch run.

    On small models, any fraction from a third to nine tenths of the best scratch peak ended within 0.003 of the best;
    at the full peak the grown model lost its advantage. A warm-up of 50 of 800 steps made little difference.
    """
    peak = section.lr * section.grown_peak
    warmup = section.warmup_steps if section.grown_warmup_steps is None else section.grown_warmup_steps
    return replace(section, lr=peak, min_lr=min(section.min_lr, peak), warmup_steps=warmup)
