"""Symbolic links in a checkpoint folder: they must not lead out of it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, ErrorCollector

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def allowed_roots(folder: Path) -> list[Path]:
    """Returns the folders that links may lead into: this one, and the blobs if it is a Hugging Face snapshot."""
    root = folder.resolve()
    is_cached = root.parent.name == SNAPSHOTS
    return [root, root.parent.parent / BLOBS] if is_cached else [root]


def check_symlinks(folder: Path) -> None:
    """Raises CheckpointError with every link below the folder that leads out of it. The folder may be a link."""
    roots = allowed_roots(folder)
    errors = ErrorCollector(f"{folder} has links that lead out of it; they are not followed", CheckpointError)
    for parent, folders, files in os.walk(folder):
        for path in (Path(parent, name) for name in (*folders, *files)):
            if path.is_symlink() and not any(_resolve_target(path).is_relative_to(root) for root in roots):
                errors.add(f"{path.relative_to(folder)}", "a file or folder inside", f"a link to {path.readlink()}")
    errors.raise_if_any()


def _resolve_target(link: Path) -> Path:
    # Path.resolve raises for a link to itself; realpath does not.
    return Path(os.path.realpath(link))
