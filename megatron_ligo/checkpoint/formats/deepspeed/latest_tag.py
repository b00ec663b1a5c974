"""The folder that a small file beside it names, as DeepSpeed's `latest` and `latest_universal` do."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, Problem

# Of a name, in any file system.
LONGEST = 255


def tagged(path: Path, latest: str) -> Path:
    """The folder that `path/latest` names; `path` itself where there is no such file.

    Raises CheckpointError if the file names no folder beside itself.
    """
    file = path / latest
    if not file.is_file():
        return path
    tag = file.read_bytes().decode(errors="replace").strip()
    plain = len(tag) <= LONGEST and tag not in ("", ".", "..") and Path(tag).name == tag and tag.isprintable()
    if not plain or (path / tag).is_symlink() or not (path / tag).is_dir():
        raise CheckpointError(Problem(f"{file}", "the name of a folder beside it", repr(tag[:LONGEST])))
    return path / tag
