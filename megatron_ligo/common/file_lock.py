"""Exclusive file locks. The kernel releases a lock when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_ligo.common.errors import ConfigError, Problem

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
# Errors of file systems without locks.
UNSUPPORTED_ERRNOS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def lock_file(path: Path, wait: bool = False) -> IO[str] | None:
    """Creates the file if needed and returns it locked. Without `wait`: None if another process holds the lock.

    On a file system without locks it warns and returns the file unlocked.
    """
    # NFS locks only files that are open for writing, so folders cannot be locked themselves.
    file = _open_regular(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            file.close()
            raise
        log.warning("%s: its file system has no locks: nothing keeps two runs apart there", path.parent)
        return file
    if _is_current(path, file):
        return file
    # The previous holder has removed the file in the meantime.
    file.close()
    return lock_file(path, wait)


def _open_regular(path: Path) -> IO[str]:
    """Opens the lock's file for writing. ConfigError if a pipe or a device is there, whose opening may never end."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        hint = "Remove it, or choose another --output."
        raise ConfigError(Problem(f"{path}", "a lock file, or nothing", "something else than a file", hint))
    return os.fdopen(descriptor, "w")


@contextmanager
def exclusive_access(folder: Path) -> Iterator[None]:
    """Creates the folder if needed and locks it. Raises ConfigError if another process holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    file = lock_folder(folder)
    try:
        yield
    finally:
        (folder / LOCK_FILE).unlink(missing_ok=True)
        file.close()


def lock_folder(folder: Path) -> IO[str]:
    """Locks a folder until the returned file is closed. Raises ConfigError if another process holds the lock."""
    file = lock_file(folder / LOCK_FILE)
    if file is None:
        hint = "Wait until it ends, or choose another --output."
        raise ConfigError(Problem(f"{folder}", "a folder that no other run writes to", "one that does", hint))
    return file


def _is_current(path: Path, file: IO[str]) -> bool:
    """True if the path still leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
