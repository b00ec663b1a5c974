"""Models by their names on the Hugging Face hub: from its cache, or downloaded into it; and the way there.

A path comes first: `org/name` names a model of the hub only if neither it nor its first part is a local folder.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, MachineError, Problem

ORGANISATION_AND_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# What is read of a model: no pickles where there are safetensors, nothing of other frameworks, no code.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")

# A relative path starts from the current folder; one that is missing was perhaps meant from a config file's folder.
config_folders: set[Path] = set()


def add_config_folder(config: Path) -> None:
    """Remembers the folder of a config file that was read."""
    config_folders.add(config.resolve().parent)


def explain_missing(path: str | Path, suffix: str = "") -> str:
    """Returns what to do about a path that is missing in the current folder and is there beside a config file, else "".

    suffix: of the file that must be there, where the path is a prefix.
    """
    path, here = Path(path), Path.cwd()
    if path.is_absolute() and path.is_relative_to(here):
        path = path.relative_to(here)
    if path.is_absolute() or path == Path():
        return ""
    folders = (folder for folder in sorted(config_folders) if Path(f"{folder / path}{suffix}").exists())
    folder = next(folders, None)
    if folder is None or folder == here:
        return ""
    return f"It is there from the config's folder: run the command in {folder}, or write the path in full."


def is_hub_name(source: str | Path) -> bool:
    """True if a source that is no path can be the name of a model on the hub."""
    text = f"{source}"
    is_local = os.path.lexists(text) or Path(text.partition("/")[0]).is_dir()
    return not is_local and ORGANISATION_AND_NAME.fullmatch(text) is not None


def find_model(source: str | Path) -> Path:
    """Returns the folder of a model: the path itself, or the hub's snapshot of that name, downloaded if need be.

    Raises CheckpointError if it is neither in the cache nor to be had.
    """
    if not is_hub_name(source):
        return Path(source)
    if explain_missing(source):
        raise CheckpointError(missing_path(source))

    import huggingface_hub  # imported late: it is slow

    try:
        return Path(huggingface_hub.snapshot_download(f"{source}", allow_patterns=list(FILES)))
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError, OSError) as error:
        hint = (
            f"As the name of a model on the Hugging Face hub: it is not in the cache, and {_describe(error)}. Check "
            "the name, the network, and `hf auth login` for a gated model."
        )
        raise CheckpointError(missing_path(source, hint=hint)) from error


def missing_path(path: str | Path, expected: str = "a checkpoint", hint: str = "") -> Problem:
    """Returns the problem of a path at which there is nothing, with the folder in which a relative one was looked for.

    hint: what else the path was taken for.
    """
    missing = "nothing there" if Path(path).is_absolute() else f"nothing there (in {Path.cwd()})"
    hint = explain_missing(path) or f"Check the path. {hint}".rstrip()
    return Problem(f"{path}", expected, missing, hint)


def check_push(name: str) -> None:
    """Raises CheckpointError unless a model can have this name on the hub."""
    if not ORGANISATION_AND_NAME.fullmatch(name):
        raise CheckpointError(Problem("--push", "ORG/NAME of a model on the hub", repr(name)))


def push_model(folder: Path, name: str) -> str:
    """Uploads a folder as a model of the hub, private if it is new; returns its address. MachineError if it fails."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Written by megatron_ligo")
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.OfflineModeIsEnabled, OSError) as error:
        hint = f"{folder} is complete: upload it again with `hf upload {name} {folder}`."
        cause = _describe(error)
        raise MachineError(Problem(f"--push {name}", "the hub, and a login (`hf auth login`)", cause, hint)) from error
    return f"{address}"


def _describe(error: Exception) -> str:
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids the network"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
