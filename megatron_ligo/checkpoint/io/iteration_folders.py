"""A run's folder as Megatron-LM keeps it: one folder for each iteration that was saved, and a file that names the last.

DIR/latest_checkpointed_iteration.txt     the number, or "release"
DIR/iter_0000100/                         or release/: weights to start from, no iteration's
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.common.errors import CheckpointError, Problem

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# More digits than any run has steps.
DIGITS = 18


def folder_name(step: int) -> str:
    """Where weights after so many steps lie; Megatron-LM takes iteration 0 for a mistake."""
    return f"iter_{step:07d}" if step else RELEASE


def write_tracker(output: Output, step: int) -> None:
    output.write_text(TRACKER, str(step) if step else RELEASE)


def find_folder(path: Path) -> Path | None:
    """The iteration's folder: the one that the tracker in `path` names, `path` itself where there is none.

    None where the tracker names no folder.
    """
    if not (path / TRACKER).is_file():
        return path
    with (path / TRACKER).open("rb") as file:
        text = file.read(DIGITS + 1).decode(errors="replace").strip()
    if text != RELEASE and not (text.isascii() and text.isdigit()):
        return None
    named = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    return named if named.is_dir() and not named.is_symlink() else None


def require_folder(path: Path) -> Path:
    """As `find`. Raises CheckpointError for a tracker that names no folder."""
    found = find_folder(path)
    if found is None:
        expected = f"a number or {RELEASE!r}, and its folder (iter_NNNNNNN or {RELEASE}) beside"
        raise CheckpointError(Problem(f"{path / TRACKER}", expected, "neither, or one without the other"))
    return found
