"""The folder that a small file beside it names, as DeepSpeed's `latest` and `latest_universal` do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint.format import FormatOptions
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting

# Of a name, in any file system.
LONGEST = 255


@dataclass(frozen=True)
class TagOptions(FormatOptions):
    tag: str | None = setting(None, "name of the folder (default global_stepN)")

    def check(self, errors: ErrorCollector) -> None:
        if self.tag is not None and not _is_folder_name(self.tag):
            errors.add("option tag", "the name of a folder", repr(self.tag))

    def folder(self, step: int) -> str:
        """The tag of a checkpoint after so many steps."""
        return f"global_step{step}" if self.tag is None else self.tag


def _is_folder_name(tag: str) -> bool:
    return len(tag) <= LONGEST and tag not in ("", ".", "..") and Path(tag).name == tag and tag.isprintable()


def tagged(path: Path, latest: str) -> Path:
    """The folder that `path/latest` names; `path` itself where there is no such file.

    Raises CheckpointError if the file names no folder beside itself.
    """
    file = path / latest
    if not file.is_file():
        return path
    tag = file.read_bytes().decode(errors="replace").strip()
    if not _is_folder_name(tag) or (path / tag).is_symlink() or not (path / tag).is_dir():
        raise CheckpointError(Problem(f"{file}", "the name of a folder beside it", repr(tag[:LONGEST])))
    return path / tag
