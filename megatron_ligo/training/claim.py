"""A run's folder is its own: while it lives, no other run may write there."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from megatron_ligo.errors import ConfigError, message
from megatron_ligo.training.samples import on_rank_0

log = logging.getLogger(__name__)

# A file, for NFS locks nothing that is not open for writing, and no folder can be.
LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
# Open for as long as the process lives: a run that is killed lets go of its folder.
_held: dict[Path, IO[str]] = {}


def claim(output: Path, make: bool = False) -> None:
    """ConfigError on all ranks if another run has the folder. Where there is none it is made, or nothing done.
    Collective."""
    on_rank_0(lambda: _lock(output.resolve(), make))


def _lock(folder: Path, make: bool) -> None:
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    if folder in _held or not folder.is_dir():
        return
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        do = "Wait for its end, or choose another --output."
        raise ConfigError(message(f"{folder}", "a folder that no other run writes to", "one that does", do)) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: its file system has no locks: nothing keeps two runs apart there", folder)
    _held[folder] = file
