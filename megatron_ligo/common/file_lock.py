"""Files that one process has at a time, for as long as it keeps them open: one that is killed lets go of them."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_ligo.common.errors import ConfigError, Problem

log = logging.getLogger(__name__)

LOCK = ".lock"
# What systems answer where a file cannot be locked.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def lock(path: Path, wait: bool = False) -> IO[str] | None:
    """The file, made where there is none, open and locked; None if another process has it and we do not wait.

    Where its file system has no locks that is told, and the file is as good as locked.
    """
    # NFS locks nothing that is not open for writing, and no folder can be.
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        log.warning("%s: its file system has no locks: nothing keeps two runs apart there", path.parent)
        return file
    if _still_there(path, file):
        return file
    # Whoever had it has removed it meanwhile.
    file.close()
    return lock(path, wait)


@contextmanager
def exclusive_access(folder: Path) -> Iterator[None]:
    """Inside, a folder is this process's alone, made where there is none. ConfigError if it is another one's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = lock_folder(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        file.close()


def lock_folder(folder: Path) -> IO[str]:
    """A folder's lock, for as long as it stays open. ConfigError if another process has it."""
    file = lock(folder / LOCK)
    if file is None:
        hint = "Wait for its end, or choose another --output."
        raise ConfigError(Problem(f"{folder}", "a folder that no other run writes to", "one that does", hint))
    return file


def _still_there(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
