"""A run's folder is its own: while it lives, no other run may write there."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from megatron_ligo.errors import ConfigError, message
from megatron_ligo.training.samples import on_rank_0

# Descriptors by folder, for as long as the process lives: a run that is killed lets go of its folder.
_held: dict[Path, int] = {}


def claim(output: Path, make: bool = False) -> None:
    """ConfigError on all ranks if another run has the folder. Where there is none it is made, or nothing done.
    Collective."""
    on_rank_0(lambda: _lock(output.resolve(), make))


def _lock(folder: Path, make: bool) -> None:
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if folder in _held or not folder.is_dir():
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        do = "Wait for its end, or choose another --output."
        raise ConfigError(message(f"{folder}", "a folder that no other run writes to", "one that does", do)) from None
    _held[folder] = handle
