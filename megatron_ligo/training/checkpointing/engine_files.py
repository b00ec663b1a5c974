"""DeepSpeed's hands on the disk: what it writes is synced and digested, what it reads is never executed."""

from __future__ import annotations

from pathlib import Path

import deepspeed
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from megatron_ligo.checkpoint.io import digest, torch_files
from megatron_ligo.checkpoint.io.file_layout import explain_write_failure
from megatron_ligo.common.atomic_files import fsync_path
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.models.full.universal_loading import ALLOWED_RECORDS

ALLOWED_GLOBALS = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in ALLOWED_RECORDS]


class CheckpointFiles(TorchCheckpointEngine):
    """Takes the place of an engine's `checkpoint_engine`.

    A rank that cannot write says so in `fault` and goes on: an exception would leave the others in DeepSpeed's
    barriers. written: size and digest of each file of this rank since `begin`.
    """

    def __init__(self, config: object):
        super().__init__(config)
        self.begin()

    def begin(self) -> None:
        self.fault: CheckpointError | None = None
        self.written: dict[Path, dict] = {}

    def raise_fault(self) -> None:
        """Raises this rank's first fault since `begin`."""
        if self.fault:
            raise self.fault

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            super().makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.fault = self.fault or write_failure(Path(path), error)

    def save(self, state_dict: object, path: str) -> None:
        if self.fault:
            return
        try:
            super().save(state_dict, path)
            fsync_path(Path(path))
            self.written[Path(path)] = describe_file(Path(path))
        except RuntimeError as error:
            self.fault = write_failure(Path(path), explain_write_failure(Path(path), error))
        except OSError as error:
            self.fault = write_failure(Path(path), error)

    def load(self, path: str, map_location: object = None) -> object:
        # Not mapped: the file may be removed while its tensors are used.
        return torch_files.load(Path(path), ALLOWED_GLOBALS, mapped=False)


def install_checkpoint_files(engine: deepspeed.DeepSpeedEngine) -> CheckpointFiles:
    """Gives the engine these hands. Its copies of scripts that unpickle freely are not written either."""
    files = CheckpointFiles(engine._config)
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda folder: None
    return files


def write_failure(path: Path, error: Exception) -> CheckpointError:
    # torch's own words end with a trace of its C++.
    found = str(error).splitlines()[0] if str(error) else type(error).__name__
    hint = "Free some room or mend its rights; started again, the run goes on from its last checkpoint."
    return CheckpointError(Problem(f"{path}", "room and leave to write a checkpoint", found, hint))


def describe_file(path: Path) -> dict:
    """Size and digest of a file."""
    size = path.stat().st_size
    return {"size": size, "digest": digest.hash_file_part(path, 0, size)}
