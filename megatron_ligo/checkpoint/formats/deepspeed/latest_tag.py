"""The tag that a file such as DeepSpeed's `latest` or `latest_universal` names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint.format import FormatOptions
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.config.typed_toml import setting

# Longest file name of common file systems.
MAX_NAME_LENGTH = 255


@dataclass(frozen=True)
class TagOptions(FormatOptions):
    tag: str | None = setting(None, "name of the folder (default global_stepN)")

    def check(self, errors: ErrorCollector) -> None:
        if self.tag is not None and not _is_folder_name(self.tag):
            errors.add("option tag", "the name of a folder", repr(self.tag))

    def folder(self, step: int) -> str:
        """Returns the tag of a checkpoint after `step` optimizer steps."""
        return f"global_step{step}" if self.tag is None else self.tag


def find_tag_folder(path: Path, latest: str) -> Path:
    """Returns the folder named by the file `path/latest`, or `path` itself if there is no such file.

    Raises CheckpointError if the file names no folder inside `path`.
    """
    file = path / latest
    if not file.is_file():
        return path
    tag = file.read_bytes().decode(errors="replace").strip()
    if not _is_folder_name(tag) or (path / tag).is_symlink() or not (path / tag).is_dir():
        raise CheckpointError(Problem(f"{file}", "the name of a folder next to it", repr(tag[:MAX_NAME_LENGTH])))
    return path / tag


def _is_folder_name(tag: str) -> bool:
    return len(tag) <= MAX_NAME_LENGTH and tag not in ("", ".", "..") and Path(tag).name == tag and tag.isprintable()
