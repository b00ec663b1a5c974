"""A run's own checkpoints: written aside, synced, committed by one rename; the newest is found again without help."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_ligo.errors import CheckpointError, message
from megatron_ligo.formats.record import STATE
from megatron_ligo.parallel.mesh import agree
from megatron_ligo.training.engine import Engine

TAG = "state"
STEP = re.compile(r"step_(\d+)")


def save(engine: Engine, folder: Path, step: int, state: dict, keep_last: int, beside: Path | None = None) -> None:
    """Saves weights, optimizer and `state` (plain numbers and text) as FOLDER/step_N. Collective.

    beside: a folder whose files belong to each checkpoint (the model's sizes, its tokenizer).
    """
    aside, target = folder / f".step_{step}.new", folder / f"step_{step}"
    fault = None
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    try:
        engine.engine.save_checkpoint(str(aside), tag=TAG, client_state={STATE: state})
        if beside and dist.get_rank() == 0:
            shutil.copytree(beside, aside, dirs_exist_ok=True)
    except (OSError, RuntimeError) as error:
        fault = CheckpointError(message(f"{aside}", "room and leave to write a checkpoint", error))
    agree(fault)
    if dist.get_rank() == 0:
        _sync(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _sync_folder(folder)
        for old in steps(folder)[:-keep_last]:
            shutil.rmtree(folder / f"step_{old}")
    dist.barrier()


def steps(folder: Path) -> list[int]:
    """The steps that have a whole checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = (STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def load_last(engine: Engine, folder: Path) -> dict | None:
    """Takes up the newest checkpoint and gives its `state`; None where there is none. Collective."""
    known = steps(folder)
    if not known:
        return None
    path, state = engine.engine.load_checkpoint(str(folder / f"step_{known[-1]}"), tag=TAG)
    if path is None:
        raise CheckpointError(message(f"{folder / f'step_{known[-1]}'}", "a DeepSpeed checkpoint", "nothing to load"))
    engine.after_update()
    # DeepSpeed gives its own records along with ours, and refuses to save them again.
    return state[STATE]


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
