"""DeepSpeed's checkpoint I/O: files are fsynced and digested when written, and loaded without executing code."""

from __future__ import annotations

from pathlib import Path

import deepspeed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.checkpoint.io.file_layout import explain_write_failure
from megatron_ligo.checkpoint.run_record import describe_file
from megatron_ligo.common.atomic_files import fsync_path
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.models.full.universal_loading import ALLOWED_RECORDS

ALLOWED_GLOBALS = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in ALLOWED_RECORDS]


class CheckpointFiles(TorchCheckpointEngine):
    """Replaces an engine's `checkpoint_engine`.

    A rank that cannot write records its first error and continues: an exception would leave the other ranks in
    DeepSpeed's barriers. written: size and digest of each file that this rank has written since `begin`.
    """

    def __init__(self, config: object):
        super().__init__(config)
        self.begin()

    def begin(self) -> None:
        self.error: CheckpointError | None = None
        self.written: dict[Path, dict] = {}

    def raise_error(self) -> None:
        """Raises this rank's first error since `begin`."""
        if self.error:
            raise self.error

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or write_failure(Path(path), error)

    def save(self, state_dict: object, path: str) -> None:
        if self.error:
            return
        try:
            super().save(state_dict, path)
            fsync_path(Path(path))
            self.written[Path(path)] = describe_file(Path(path))
        except RuntimeError as error:
            self.error = write_failure(Path(path), explain_write_failure(Path(path), error))
        except OSError as error:
            self.error = write_failure(Path(path), error)

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


def write_failure(path: Path, error: Exception) -> CheckpointError:
    """Returns the CheckpointError of a failed write to `path`."""
    # Only the first line: torch appends a C++ stack trace.
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "Free some space or fix its permissions; restarted, the run resumes from its last checkpoint."
    return CheckpointError(Problem(f"{path}", "space and permission to write a checkpoint", found, hint))
