"""Files that one process has at a time, for as long as it keeps them open: one that is killed lets go of them."""

from __future__ import annotations

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

log = logging.getLogger(__name__)

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
