"""A pretraining that is continued beyond the number of steps that it was started with."""

from __future__ import annotations

import logging
from dataclasses import replace

from megatron_ligo.config.run_config import PretrainSection
from megatron_ligo.training.lr_schedule import learning_rate

log = logging.getLogger(__name__)


def without_steps(identity: dict) -> dict:
    """Returns a pretraining's identity without its number of steps, and of those that the schedule decays."""
    section = {key: value for key, value in identity["pretrain"].items() if key not in ("steps", "decay_steps")}
    return {**identity, "pretrain": section}


def read_extension(saved: dict, current: dict) -> dict | None:
    """Returns {"from", "to"}: the steps of a saved run and the larger number that is asked for now; None if it is not.

    saved, current: identities of the run. A smaller number is no extension.
    """
    before, after = (identity.get("pretrain", {}).get("steps") for identity in (saved, current))
    is_extension = type(before) is int and type(after) is int and after > before
    return {"from": before, "to": after} if is_extension else None


def describe_extension(extension: dict, section: PretrainSection, step: int) -> str:
    """Returns what an extension changes from a step (from 0) on. section: as it is trained, with the new steps."""
    before, after = (learning_rate(replace(section, steps=extension[key]), step) for key in ("from", "to"))
    text = f"extended from {extension['from']} to {extension['to']} steps after step {step}"
    if section.schedule == "constant":
        return f"{text}; the learning rate stays {after:.3g}"
    if section.schedule == "wsd":
        # A run that had decayed already goes on at the trunk's rate, unlike one that was as long from the start.
        decay = f"decays over the last {section.decay_steps} steps" if section.decay_steps else "stays"
        return f"{text}; the next learning rate is {after:.3g}, and it {decay}"
    return (
        f"{text}; from here on the {section.schedule} schedule is that of {extension['to']} steps: the next learning "
        f"rate is {after:.3g}, not {before:.3g}"
    )
