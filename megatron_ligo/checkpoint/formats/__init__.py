"""The checkpoint formats: one module each, found by looking into this folder (base.py says what a module has)."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common import symlinks
from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem, did_you_mean

__all__ = ["formats", "get", "open", "recognise", "writers"]


@cache
def formats() -> dict[str, ModuleType]:
    """Every format by name."""
    found = pkgutil.walk_packages(__path__, f"{__name__}.")
    modules = [importlib.import_module(module.name) for module in found if not module.ispkg]
    return {module.NAME: module for module in modules if hasattr(module, "NAME")}


def writers() -> list[str]:
    """Names of the formats that can be written."""
    return sorted(name for name, module in formats().items() if hasattr(module, "write"))


def get(name: str) -> ModuleType:
    """The format of that name."""
    if name not in formats():
        raise ConfigError(f"there is no format {name!r}. {did_you_mean(name, formats())}")
    return formats()[name]


def recognise(path: str | Path) -> ModuleType:
    """The format of what lies at a path, by looking at names and a few bytes."""
    path = _existing(path)
    found = {name: module for name, module in formats().items() if module.recognise(path)}
    if not found:
        looks = "".join(f"\n  {name}: {module.LOOKS}" for name, module in sorted(formats().items()))
        raise CheckpointError(
            f"{path}: expected a checkpoint, found none of these. Insist on a format with --from to be told what "
            f"it lacks.{looks}"
        )
    if len(found) > 1:
        names = " and ".join(sorted(found))
        raise CheckpointError(Problem(f"{path}", "one checkpoint", names, "Choose one with --from."))
    (module,) = found.values()
    return module


def open(path: str | Path, format: str | None = None) -> Reader:
    """A Reader of the checkpoint at a path; `format` insists on one instead of looking. Reads headers only.

    Raises CheckpointError with every fault of the headers or every link that leads out of the folder, ConfigError for
    an unknown format.
    """
    module = get(format) if format else recognise(path)
    symlinks.check_links(_existing(path))
    return module.open(Path(path))


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise CheckpointError(Problem(f"{path}", "a checkpoint", "nothing there", "Check the path."))
    return path
