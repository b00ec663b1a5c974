"""The registry of checkpoint formats: every `Format` subclass in this folder, found by scanning it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from megatron_ligo.checkpoint.format import Format
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common import hub_models, symlinks
from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem, did_you_mean
from megatron_ligo.common.folder_kinds import MODEL, find_model_part, identify
from megatron_ligo.config.run_config import SmallSection

__all__ = ["formats", "get", "open", "open_small", "recognise", "writers"]


@cache
def formats() -> dict[str, Format]:
    """Returns every format by name."""
    return {format.name: format for format in _scan()}


def _scan() -> Iterator[Format]:
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        if not info.ispkg:
            module = importlib.import_module(info.name)
            for _, cls in inspect.getmembers(module, inspect.isclass):
                if issubclass(cls, Format) and cls.__module__ == info.name and not inspect.isabstract(cls):
                    yield cls()


def writers() -> list[str]:
    """Returns the names of the formats that can be written."""
    return sorted(name for name, format in formats().items() if format.writable)


def get(name: str) -> Format:
    """Returns the format of that name. Raises ConfigError if there is none."""
    if name not in formats():
        raise ConfigError(
            Problem(f"format {name!r}", "a known format", "none of that name", did_you_mean(name, formats()))
        )
    return formats()[name]


def recognise(path: str | Path) -> Format:
    """Returns a checkpoint's format, by file names and a few bytes. Raises CheckpointError for none or several."""
    path = _check_exists(path)
    matches = {name: format for name, format in formats().items() if format.recognise(path)}
    if not matches:
        matches = {name: format for name, format in formats().items() if format.recognise_part(path)}
    if not matches and (kind := identify(path)) not in (None, MODEL):
        raise CheckpointError(Problem(f"{path}", "a checkpoint", kind, "Give the folder or the file of a model."))
    if not matches:
        descriptions = "".join(f"\n  {name}: {format.description}" for name, format in sorted(formats().items()))
        raise CheckpointError(
            f"{path}: expected a checkpoint, found none of these. Insist on a format with --from (format= in Python) "
            f"to be told what it lacks.{descriptions}"
        )
    if len(matches) > 1:
        names = " and ".join(sorted(matches))
        raise CheckpointError(Problem(f"{path}", "one checkpoint", names, "Choose one with --from."))
    (format,) = matches.values()
    return format


def open(path: str | Path, format: str | None = None, accept: Iterable[str] = ()) -> Reader:
    """Opens the checkpoint at a path, reading headers only. format: its name; None: it is recognised.

    `org/name` without such a folder is a model of the Hugging Face hub (hub_models.py).
    The folder of a hand-off or a pretraining stands for its checkpoint (folder_kinds.py).
    accept: names of config keys that this program does not know and that the user lets through (source_keys.py).
    Raises CheckpointError with every error in the headers or every link that leads out of the folder, ConfigError for
    an unknown format or a name in `accept` that the checkpoint does not state.
    """
    path = find_model_part(_check_exists(path))
    chosen = get(format) if format else recognise(path)
    symlinks.check_symlinks(path)
    accepted = AcceptedKeys(accept)
    reader = chosen.open(Path(path), accepted)
    accepted.check_used(path)
    reader.accepted = accepted.used
    return reader


def open_small(small: SmallSection) -> Reader:
    """Opens the small model that a run's config names. Raises as `open` does."""
    return open(small.path, None if small.format == "auto" else small.format, small.accept)


def _check_exists(path: str | Path) -> Path:
    path = hub_models.find_model(path)
    if not path.exists():
        raise CheckpointError(hub_models.missing_path(path))
    return path
