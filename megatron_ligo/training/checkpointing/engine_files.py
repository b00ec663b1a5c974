"""DeepSpeed's checkpoint I/O: files are digested while they are written, fsynced, and loaded without executing code."""

from __future__ import annotations

from pathlib import Path

import deepspeed
import torch
import xxhash
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.common.atomic_files import fsync_descriptor
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.models.full.universal_loading import ALLOWED_RECORDS
from megatron_ligo.training.checkpointing.background_writer import (
    BackgroundWriter,
    FinishedWriter,
    stage,
    start_writer,
)

ALLOWED_GLOBALS = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in ALLOWED_RECORDS]


class CheckpointFiles(TorchCheckpointEngine):
    """Replaces an engine's `checkpoint_engine`.

    A rank that cannot write records its first error and continues: an exception would leave the other ranks in
    DeepSpeed's barriers.
    """

    def __init__(self, config: object):
        super().__init__(config)
        self.begin(in_background=False)

    def begin(self, in_background: bool) -> None:
        """Starts a checkpoint. in_background: what it has to write is kept for `start_writer`."""
        self.in_background = in_background
        self.error: CheckpointError | None = None
        self._written: dict[Path, dict] = {}
        self._staged: list[tuple[Path, object]] = []
        self._copies: dict[int, torch.UntypedStorage] = {}

    def written(self) -> dict[Path, dict]:
        """Returns size and digest of each file that this rank has written since `begin`, or raises its first error."""
        if self.error:
            raise self.error
        return self._written

    def start_writer(self) -> BackgroundWriter | FinishedWriter:
        """Starts to write what DeepSpeed has given since `begin`, and forgets it."""
        staged, error = self._staged, self.error
        self._staged, self._copies = [], {}

        def write() -> dict[Path, dict]:
            if error:
                raise error
            return {path: write_file(state, path) for path, state in staged}

        return start_writer(write)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or write_failure(Path(path), error)

    def save(self, state_dict: object, path: str) -> None:
        if self.error:
            return
        if self.in_background:
            self._staged.append((Path(path), stage(state_dict, self._copies)))
            return
        try:
            self._written[Path(path)] = write_file(state_dict, Path(path))
        except CheckpointError as error:
            self.error = error

    def load(self, path: str, map_location: object = None) -> object:
        # Not memory-mapped: the file may be removed while its tensors are in use.
        return torch_files.load(Path(path), ALLOWED_GLOBALS, mapped=False)


def install_checkpoint_files(engine: deepspeed.DeepSpeedEngine) -> CheckpointFiles:
    """Routes the engine's checkpoint files through `CheckpointFiles`.

    DeepSpeed's recovery script is not copied into checkpoints: it unpickles without restrictions.
    """
    files = CheckpointFiles(engine._config)
    engine.checkpoint_engine = files
    engine._copy_recovery_script = _copy_nothing
    return files


def _copy_nothing(folder: str) -> None:
    pass


class DigestingFile:
    """A file for torch.save that computes the digest of what is written.

    An error is kept for `close`: torch's writer, in C++, would end the process if it met one.
    """

    def __init__(self, path: Path):
        self._file = path.open("wb", buffering=0)
        self._hash = xxhash.xxh3_128()
        self._size = 0
        self._error: OSError | None = None

    def write(self, data: memoryview) -> int:
        rest = memoryview(data)
        self._hash.update(rest)
        self._size += len(rest)
        try:
            while rest and not self._error:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._error = error
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> dict:
        """Fsyncs the file and returns its size and digest, as `describe_file` does. Raises the first OSError."""
        with self._file:
            if self._error:
                raise self._error
            fsync_descriptor(self._file.fileno())
        return {"size": self._size, "digest": self._hash.hexdigest()}


def write_file(state: object, path: Path) -> dict:
    """Writes a file of torch's and returns its size and digest. CheckpointError if that fails."""
    try:
        file = DigestingFile(path)
        torch.save(state, file)
        return file.close()
    except OSError as error:
        raise write_failure(path, error) from error


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """Returns the CheckpointError of a failed write to `path`."""
    # Only the first line: torch appends a C++ stack trace.
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "Free some space or fix its permissions; restarted, the run resumes from its last checkpoint."
    return CheckpointError(Problem(f"{path}", "space and permission to write a checkpoint", found, hint))
