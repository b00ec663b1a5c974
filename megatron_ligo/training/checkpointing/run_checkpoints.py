"""A run's own checkpoints: written under a temporary name, fsynced, and published by one rename.

FOLDER/step_N/state/        DeepSpeed's files
FOLDER/step_N/record.json   the run's state, with size and digest of every file; a folder without it is incomplete
FOLDER/step_N.damaged/      a damaged checkpoint that was moved aside
"""

from __future__ import annotations

import copy
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.model_record import RUN_STATE
from megatron_ligo.checkpoint.run_record import (
    RECORD,
    check_recorded_file,
    check_step,
    describe_file,
    read_run_record,
    write_run_record,
)
from megatron_ligo.common.atomic_files import (
    fsync_folders,
    fsync_path,
    read_json,
    remove_tree,
    replace_folder,
    restore_backup,
)
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.distributed import mesh
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.distributed.parallel_dims import EngineLayout
from megatron_ligo.training.checkpointing.background_writer import BackgroundWriter, FinishedWriter
from megatron_ligo.training.checkpointing.engine_files import ALLOWED_GLOBALS, write_failure
from megatron_ligo.training.engine import Engine

log = logging.getLogger(__name__)

ENGINE_TAG = "state"
STEP = re.compile(r"step_(\d+)")
# What a killed run may leave: an unpublished checkpoint, and the backup of one that was being replaced.
UNFINISHED, BACKUP = re.compile(r"\.step_\d+\.new"), re.compile(r"\.(step_\d+)\.old")


@dataclass(frozen=True)
class RunCheckpoint:
    """A complete, verified checkpoint: the run's state, the layout at which it was written, its record's version."""

    folder: Path
    step: int
    state: dict
    layout: EngineLayout
    version: int


@dataclass(frozen=True)
class Retention:
    """The checkpoints to keep: the last `keep_last`, and those that `protected` picks from the steps that have one."""

    keep_last: int
    protected: Callable[[Sequence[int]], set[int]] = lambda steps: set()


class CheckpointSaver:
    """Saves a run's checkpoints as FOLDER/step_N. Every method is collective.

    extra_files: a folder whose files go into each checkpoint (the model's config, its tokenizer). in_background:
    another process writes the files; the checkpoint is published once those of all ranks are done, by `poll`, `finish`
    or the next `save`. CheckpointError on every rank if a weight is not finite or a file cannot be written; the
    previous checkpoints stay as they are.
    """

    def __init__(self, engine: Engine, folder: Path, extra_files: Path | None = None, in_background: bool = False):
        self.engine, self.folder, self.extra_files, self.in_background = engine, folder, extra_files, in_background
        self._writer: BackgroundWriter | FinishedWriter | None = None

    def save(self, step: int, state: dict, retention: Retention, wait: bool = False) -> None:
        """Saves weights, optimizer and `state` (JSON values), after the last checkpoint is finished.

        wait: this process writes.
        """
        self.finish()
        engine, ranks = self.engine, all_ranks()
        ranks.run_on_all(lambda: _check_finite(engine.module, step))
        temporary = _temporary_folder(self.folder, step)
        _change_files(temporary, lambda: _create_empty(temporary))
        in_background = self.in_background and not wait
        engine.files.begin(in_background)
        client_state = {RUN_STATE: state}
        engine.engine.save_checkpoint(str(temporary), tag=ENGINE_TAG, client_state=client_state, save_latest=False)
        record = {"step": step, "state": copy.deepcopy(state), "layout": engine.layout.to_json()}
        if in_background:
            self._writer = engine.files.start_writer()
            self._record, self._retention = record, retention
        else:
            self._complete(engine.files.written, record, retention)

    def poll(self) -> None:
        """Publishes the checkpoint that is being written, if it is done on all ranks."""
        if self._writer is not None and not mesh.max_over_ranks(not self._writer.is_done()):
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if any, and publishes it."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._complete(writer.result, self._record, self._retention)

    def settle(self) -> None:
        """Finishes the checkpoint that is being written. If that fails the log says so: the run ends in any case."""
        try:
            self.finish()
        except CheckpointError as error:
            log.warning("%s", error)

    def _complete(self, written: Callable[[], dict[Path, dict]], record: dict, retention: Retention) -> None:
        """Publishes a checkpoint whose files are there. written: what each rank has written, or its error."""
        folder, step, ranks = self.folder, record["step"], all_ranks()
        temporary, target = _temporary_folder(folder, step), folder / f"step_{step}"
        try:
            own = ranks.run_on_all(written)
            files = {path: entry for part in ranks.all_gather(own) for path, entry in part.items()}
            _change_files(temporary, lambda: write_record(temporary, self.extra_files, files, record))
        except CheckpointError:
            # Frees the space for other writers.
            _change_files(temporary, lambda: shutil.rmtree(temporary, ignore_errors=True))
            raise
        _change_files(target, lambda: replace_folder(temporary, target, folder / f".step_{step}.old"))
        _change_files(folder, lambda: _delete_old(folder, step, retention))


def save(
    engine: Engine, folder: Path, step: int, state: dict, retention: Retention, extra_files: Path | None = None
) -> None:
    """Saves one checkpoint as `CheckpointSaver` does, and waits for it. Collective."""
    CheckpointSaver(engine, folder, extra_files).save(step, state, retention)


def list_steps(folder: Path) -> list[int]:
    """Returns the steps that have a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    matches = (STEP.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def find_newest(folder: Path) -> RunCheckpoint | None:
    """Returns the newest complete checkpoint, or None if there is no checkpoint. Collective.

    Damaged ones are reported and moved aside. CheckpointError if all of them are damaged.
    """
    _change_files(folder, lambda: _clean_up(folder))
    errors = ErrorCollector(f"{folder} has no complete checkpoint", CheckpointError)
    damaged: list[Path] = []
    ranks = all_ranks()
    for step in reversed(ranks.all_gather(list_steps(folder))[0]):
        checkpoint = folder / f"step_{step}"
        try:
            with ranks.agree():
                record = _read_verified(checkpoint, step)
        except CheckpointError as error:
            log.warning("%s", error)
            errors.add_message(str(error))
            damaged.append(checkpoint)
            continue
        for path in damaged:
            log.warning("%s: moved to %s.damaged", path, path.name)
        _change_files(folder, lambda: _move_aside(damaged))
        return RunCheckpoint(
            checkpoint, step, record["state"], EngineLayout.from_json(record["layout"]), record["version"]
        )
    errors.raise_if_any()
    return None


def read_state(folder: Path) -> dict:
    """Reads the run's state in a checkpoint's folder; {} if no run wrote it. CheckpointError if its record is bad."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        return dict(read_json(path, finite=False)["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{path}", "a checkpoint's record", f"{error!r}")) from None


def load(engine: Engine, checkpoint: RunCheckpoint) -> dict:
    """Loads a checkpoint of the engine's own layout and returns its state. Collective."""
    path, _ = engine.engine.load_checkpoint(str(checkpoint.folder), tag=ENGINE_TAG)
    if path is None:
        raise CheckpointError(Problem(f"{checkpoint.folder}", "a DeepSpeed checkpoint", "nothing to load"))
    engine.after_update()
    return checkpoint.state


def _temporary_folder(folder: Path, step: int) -> Path:
    return folder / f".step_{step}.new"


def _create_empty(folder: Path) -> None:
    # Does not create OUTPUT itself: a run whose --output was deleted must fail.
    folder.parent.mkdir(exist_ok=True)
    remove_tree(folder)
    folder.mkdir()


def write_record(folder: Path, extra_files: Path | None, written: dict[Path, dict], record: dict) -> None:
    """Completes a checkpoint on rank 0: copies extra files, then writes the record with the digests of all files.

    written: size and digest of the files that the ranks have written and fsynced.
    """
    (folder / "latest").write_text(ENGINE_TAG)
    if extra_files:
        shutil.copytree(extra_files, folder, dirs_exist_ok=True)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[str(path.relative_to(folder))] = written.get(path) or describe_file(path)
        if path not in written:
            fsync_path(path)
    missing = [str(path) for path in written if not path.is_file()]
    assert not missing, f"written, but missing: {missing}"
    write_run_record(folder, {**record, "files": files})
    fsync_folders(folder)


def _delete_old(folder: Path, step: int, retention: Retention) -> None:
    """Deletes the checkpoints up to `step` that `retention` does not keep; later ones, of an earlier run, stay.

    A checkpoint that was moved and linked is its user's: it stays too.
    """
    steps = [other for other in list_steps(folder) if other <= step]
    kept = {*steps[-retention.keep_last :], *retention.protected(steps)}
    for old in steps:
        if old not in kept and not (folder / f"step_{old}").is_symlink():
            remove_tree(folder / f"step_{old}")


def _clean_up(folder: Path) -> None:
    """Removes unfinished checkpoints of a killed run and restores backups."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if UNFINISHED.fullmatch(path.name):
            remove_tree(path)
        elif match := BACKUP.fullmatch(path.name):
            restore_backup(path, folder / match[1])


def _move_aside(damaged: list[Path]) -> None:
    for path in damaged:
        target = path.with_name(f"{path.name}.damaged")
        remove_tree(target)
        path.rename(target)
        fsync_path(path.parent)


def _read_verified(checkpoint: Path, step: int) -> dict:
    """Reads a checkpoint's record and verifies this rank's share of its files. CheckpointError if any is damaged.

    step: which the folder's name states. One that was renamed or copied is of another.
    """
    record = read_run_record(checkpoint / RECORD)
    check_step(checkpoint, record, step)
    errors = ErrorCollector(f"{checkpoint} is damaged", CheckpointError)
    for name in sorted(record["files"])[dist.get_rank() :: dist.get_world_size()]:
        _verify_file(checkpoint / name, record["files"][name], errors)
    errors.raise_if_any()
    return record


def _verify_file(path: Path, expected: dict, errors: ErrorCollector) -> None:
    if check_recorded_file(path, expected, errors) and path.suffix == ".pt":
        try:
            torch_files.load(path, ALLOWED_GLOBALS)
        except CheckpointError as error:
            errors.add_message(str(error))


def _check_finite(module: nn.Module, step: int) -> None:
    """Raises CheckpointError if a weight of this rank is not finite."""
    bad_names = [
        name
        for name, parameter in module.named_parameters()
        if not bool(torch.isfinite(getattr(parameter, "ds_tensor", parameter)).all())
    ]
    if bad_names:
        found = f"NaN or Inf in {', '.join(bad_names[:10])}"
        hint = "Nothing is saved; the last checkpoint is unchanged."
        raise CheckpointError(Problem(f"step {step}", "finite weights", found, hint))


def _change_files(path: Path, work: Callable[[], None]) -> None:
    """Runs `work`, which changes files, on rank 0. CheckpointError on all ranks if it raises OSError. Collective."""
    with all_ranks().agree():
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                raise write_failure(path, error) from error
