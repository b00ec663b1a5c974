"""The record that the Trainer of transformers leaves beside its weights."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json

TRAINER_STATE = "trainer_state.json"


def read_trainer_step(folder: Path) -> int:
    """Returns the optimizer steps that the record states; 0 if there is none, or none that can be read.

    Weights are what they are without it: a damaged record is no reason to refuse them.
    """
    try:
        step = read_json(folder / TRAINER_STATE, finite=False)["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return step if type(step) is int and step > 0 else 0
