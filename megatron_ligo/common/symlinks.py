"""Links in a checkpoint's folder: what is read from it must lie in it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, ErrorCollector

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def allowed_roots(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it, and in a Hugging Face cache in the blobs beside its snapshots."""
    place = folder.resolve()
    cached = place.parent.name == SNAPSHOTS
    return [place, place.parent.parent / BLOBS] if cached else [place]


def check_links(folder: Path) -> None:
    """CheckpointError with every link below a folder that leads elsewhere. The folder itself may be one."""
    allowed = allowed_roots(folder)
    errors = ErrorCollector(f"{folder} has links that lead out of it; they are not followed", CheckpointError)
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in (*folders, *files)):
            if path.is_symlink() and not any(_target(path).is_relative_to(home) for home in allowed):
                errors.add(f"{path.relative_to(folder)}", "a file or folder inside", f"a link to {path.readlink()}")
    errors.raise_if_any()


def _target(link: Path) -> Path:
    # realpath, as Path.resolve raises for a link to itself.
    return Path(os.path.realpath(link))
