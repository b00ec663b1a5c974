"""What must not be in a checkpoint folder: symbolic links that lead out of it, and pipes, whose readers would wait."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, ErrorCollector

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def allowed_roots(folder: Path) -> list[Path]:
    """Returns the folders that links may lead into: this one, and the blobs if it is a Hugging Face snapshot."""
    root = folder.resolve()
    is_cached = root.parent.name == SNAPSHOTS
    return [root, root.parent.parent / BLOBS] if is_cached else [root]


def check_symlinks(folder: Path) -> None:
    """Raises CheckpointError with every link below the folder that leads out of it, and all but files and folders.

    The folder may be a link.
    """
    roots = allowed_roots(folder)
    errors = ErrorCollector(f"{folder} has what is not followed or read", CheckpointError)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if stat.S_IFMT(path.lstat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                errors.add(f"{path.relative_to(folder)}", "a file or folder", "a pipe, a socket or a device")
            elif path.is_symlink() and not any(_resolve_target(path).is_relative_to(root) for root in roots):
                errors.add(f"{path.relative_to(folder)}", "a file or folder inside", f"a link to {path.readlink()}")
    errors.raise_if_any()


def _resolve_target(link: Path) -> Path:
    # Path.resolve raises for a link to itself; realpath does not.
    return Path(os.path.realpath(link))
