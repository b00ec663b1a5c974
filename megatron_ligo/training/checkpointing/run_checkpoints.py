"""A run's own checkpoints: written aside, synced, committed by one rename; the newest whole one is found without help.

FOLDER/step_N/state/        DeepSpeed's files
FOLDER/step_N/record.json   the run's own state, and size and digest of every file: without it the folder is not whole
FOLDER/step_N.damaged/      what was found damaged, out of the way
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.model_record import RUN_STATE
from megatron_ligo.common.atomic_files import (
    fsync_folders,
    fsync_path,
    read_json,
    replace_folder,
    restore_backup,
    write_json,
)
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.distributed.parallel_dims import EngineLayout
from megatron_ligo.training.checkpointing.engine_files import ALLOWED_GLOBALS, describe_file, write_failure
from megatron_ligo.training.engine import Engine

log = logging.getLogger(__name__)

ENGINE_TAG = "state"
RECORD = "record.json"
RECORD_VERSION = 2
STEP = re.compile(r"step_(\d+)")
# What a killed run may leave behind: a checkpoint not yet committed, and one that a newer was to replace.
UNFINISHED, BACKUP = re.compile(r"\.step_\d+\.new"), re.compile(r"\.(step_\d+)\.old")


@dataclass(frozen=True)
class RunCheckpoint:
    """A whole checkpoint, its files checked, the state that was saved with it, and the layout that wrote it."""

    folder: Path
    step: int
    state: dict
    layout: EngineLayout


def save(engine: Engine, folder: Path, step: int, state: dict, keep_last: int, beside: Path | None = None) -> None:
    """Saves weights, optimizer and `state` (plain numbers and text) as FOLDER/step_N. Collective.

    beside: a folder whose files belong to each checkpoint (the model's sizes, its tokenizer).
    CheckpointError on every rank, with the checkpoints before left as they are, if a weight is not finite or a file
    cannot be written.
    """
    ranks = all_ranks()
    ranks.run_on_all(lambda: _check_finite(engine.module, step))
    aside, target = folder / f".step_{step}.new", folder / f"step_{step}"
    _on_rank_0(aside, lambda: _make(aside))
    engine.files.begin()
    engine.engine.save_checkpoint(str(aside), tag=ENGINE_TAG, client_state={RUN_STATE: state}, save_latest=False)
    try:
        ranks.run_on_all(engine.files.raise_fault)
        known = {path: entry for part in ranks.all_gather(engine.files.written) for path, entry in part.items()}
        record = {"step": step, "state": state, "layout": engine.layout.to_json()}
        _on_rank_0(aside, lambda: write_record(aside, beside, known, record))
    except CheckpointError:
        # Its room may be what others need.
        _on_rank_0(aside, lambda: shutil.rmtree(aside, ignore_errors=True))
        raise
    _on_rank_0(target, lambda: replace_folder(aside, target, folder / f".step_{step}.old"))
    _on_rank_0(folder, lambda: _retain(folder, step, keep_last))


def list_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = (STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def find_newest(folder: Path) -> RunCheckpoint | None:
    """The newest whole checkpoint; None where none was ever made. Damaged ones are told, and set aside. Collective.

    CheckpointError if there are checkpoints and all are damaged.
    """
    _on_rank_0(folder, lambda: _tidy(folder))
    errors = ErrorCollector(f"{folder} has no checkpoint that is whole", CheckpointError)
    damaged: list[Path] = []
    ranks = all_ranks()
    for step in reversed(ranks.all_gather(list_steps(folder))[0]):
        place = folder / f"step_{step}"
        try:
            with ranks.agree():
                record = _read_and_check(place)
        except CheckpointError as error:
            log.warning("%s", error)
            errors.add_message(str(error))
            damaged.append(place)
            continue
        for other in damaged:
            log.warning("%s: set aside as %s.damaged", other, other.name)
        _on_rank_0(folder, lambda: _set_aside(damaged))
        return RunCheckpoint(place, step, record["state"], EngineLayout.from_json(record["layout"]))
    errors.raise_if_any()
    return None


def read_state(folder: Path) -> dict:
    """The state that was saved with a checkpoint, STEP's folder; empty where it is none of a run of ours."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path)["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{path}", "a checkpoint's record", f"{error!r}")) from None


def load(engine: Engine, found: RunCheckpoint) -> dict:
    """Takes up a checkpoint of the engine's own layout; returns its `state`. Collective."""
    path, _ = engine.engine.load_checkpoint(str(found.folder), tag=ENGINE_TAG)
    if path is None:
        raise CheckpointError(Problem(f"{found.folder}", "a DeepSpeed checkpoint", "nothing to load"))
    engine.after_update()
    return found.state


def _make(aside: Path) -> None:
    # The folder above is not made: a run whose --output has vanished must not go on somewhere else.
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()


def write_record(aside: Path, beside: Path | None, known: dict[Path, dict], record: dict) -> None:
    """All that rank 0 puts beside the ranks' files, at last the digests of them all. known: those that ranks have."""
    (aside / "latest").write_text(ENGINE_TAG)
    if beside:
        shutil.copytree(beside, aside, dirs_exist_ok=True)
    files = {}
    for path in sorted(path for path in aside.rglob("*") if path.is_file()):
        files[str(path.relative_to(aside))] = known.get(path) or describe_file(path)
        if path not in known:
            fsync_path(path)
    missing = [str(path) for path in known if not path.is_file()]
    assert not missing, f"written and not there: {missing}"
    write_json(aside / RECORD, {"version": RECORD_VERSION, **record, "files": files})
    fsync_folders(aside)


def _retain(folder: Path, step: int, keep_last: int) -> None:
    """The one of this step is whole; of the others only older ones go."""
    for old in [other for other in list_steps(folder) if other < step][: -(keep_last - 1) or None]:
        shutil.rmtree(folder / f"step_{old}")


def _tidy(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path)
        elif match := BACKUP.fullmatch(path.name):
            restore_backup(path, folder / match[1])


def _set_aside(damaged: list[Path]) -> None:
    for place in damaged:
        away = place.with_name(f"{place.name}.damaged")
        shutil.rmtree(away, ignore_errors=True)
        place.rename(away)
        fsync_path(place.parent)


def _read_and_check(place: Path) -> dict:
    """Reads a checkpoint's record and checks this rank's share of its files. CheckpointError if any is damaged."""
    record = _read_record(place / RECORD)
    errors = ErrorCollector(f"{place} is damaged", CheckpointError)
    share = sorted(record["files"])[dist.get_rank() :: dist.get_world_size()]
    for name in share:
        _check_file(place, name, record["files"][name], errors)
    errors.raise_if_any()
    return record


def _read_record(path: Path) -> dict:
    try:
        record = read_json(path)
        if record["version"] != RECORD_VERSION:
            raise CheckpointError(Problem(f"{path}", f"version {RECORD_VERSION}", record["version"]))
        files = {str(name): (int(entry["size"]), str(entry["digest"])) for name, entry in record["files"].items()}
        EngineLayout.from_json(record["layout"])
        if not files or not isinstance(record["state"], dict):
            raise KeyError("files and state")
    except OSError as error:
        raise CheckpointError(Problem(f"{path}", "the record of a checkpoint", error.strerror)) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(Problem(f"{path}", "the record of a checkpoint", f"{error!r}")) from None
    return record


def _check_file(place: Path, name: str, expected: dict, errors: ErrorCollector) -> None:
    path = place / name
    if path.exists() and not path.is_file():
        # To read a pipe is to wait.
        errors.add(f"{path}", "a file", "something else")
        return
    try:
        found = describe_file(path)
    except OSError as error:
        errors.add(f"{path}", f"{expected['size']} bytes", error.strerror)
        return
    if found != expected:
        errors.add(f"{path}", f"{expected['size']} bytes, digest {expected['digest']}", f"{found}")
    elif path.suffix == ".pt":
        try:
            torch_files.load(path, ALLOWED_GLOBALS)
        except CheckpointError as error:
            errors.add_message(str(error))


def _check_finite(module: nn.Module, step: int) -> None:
    """CheckpointError if a weight of this rank is not finite."""
    bad = []
    for name, parameter in module.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter)
        if not bool(torch.isfinite(held).all()):
            bad.append(name)
    if bad:
        hint = "Nothing is saved; the last checkpoint is as it was."
        raise CheckpointError(Problem(f"step {step}", "finite weights", f"NaN or Inf in {', '.join(bad[:10])}", hint))


def _on_rank_0(place: Path, work: Callable[[], None]) -> None:
    """Changes files on rank 0 alone. CheckpointError on all ranks if the disk refuses."""
    with all_ranks().agree():
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                raise write_failure(place, error) from error
