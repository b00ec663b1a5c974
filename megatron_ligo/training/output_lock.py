"""A run's folder is its own: while it lives, no other run may write there."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from megatron_ligo.common.file_lock import lock_folder
from megatron_ligo.distributed.mesh import all_ranks

# Open for as long as the process lives.
_held: dict[Path, IO[str]] = {}


def lock_output(output: Path, make: bool = False) -> None:
    """ConfigError on all ranks if another run has the folder. Where there is none it is made, or nothing done.
    Collective."""
    all_ranks().run_on_rank_0(lambda: _lock(output.resolve(), make))


def _lock(folder: Path, make: bool) -> None:
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if folder in _held or not folder.is_dir():
        return
    _held[folder] = lock_folder(folder)
