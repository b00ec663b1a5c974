"""The checkpoint folder of a Megatron-LM run: one folder per iteration, and a tracker file that names the latest.

DIR/latest_checkpointed_iteration.txt     the number, or "release"
DIR/iter_0000100/                         or release/: weights to start from
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.common.errors import CheckpointError, Problem

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
# More digits than any step count has.
DIGITS = 18


def folder_name(step: int) -> str:
    """Returns the folder's name for an iteration. Megatron-LM refuses iteration 0, which becomes "release"."""
    return f"iter_{step:07d}" if step else RELEASE


def write_tracker(output: Output, step: int) -> None:
    output.write_text(TRACKER, str(step) if step else RELEASE)


def find_folder(path: Path) -> Path | None:
    """Returns the folder that the tracker in `path` names; `path` itself without a tracker.

    Returns None if the tracker names no folder.
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
    """Like `find_folder`, but raises CheckpointError for a tracker that names no folder."""
    folder = find_folder(path)
    if folder is None:
        expected = f"a number or {RELEASE!r}, and its folder (iter_NNNNNNN or {RELEASE}) beside"
        raise CheckpointError(Problem(f"{path / TRACKER}", expected, "neither, or one without the other"))
    return folder
