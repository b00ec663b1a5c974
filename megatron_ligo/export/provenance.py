"""growth.json: where a grown model comes from. It is written last: a hand-off without it is incomplete."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.common.file_digest import SEAL, is_intact, seal

RECORD_NAME = "growth.json"
PRETRAIN_RECORD = "pretrain.json"
# Version 1 has no digest of its own.
VERSION, VERSIONS = 2, (1, 2)
# The entries that identify a grown start: the small model's digest, and the operator's digest and settings.
ORIGIN_KEYS = {"source", "operator"}


def read(folder: Path) -> dict | None:
    """Reads a hand-off's record; None without one. Raises CheckpointError if it is invalid."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path, finite=False)
        version = record["version"]
        if version in VERSIONS:
            _check_fields(record)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{path}", "the record of a hand-off", f"{error!r}")) from None
    if version not in VERSIONS:
        raise CheckpointError(Problem(f"{path}", f"version {VERSION}", version))
    if version > 1 and not is_intact(record):
        raise CheckpointError(Problem(f"{path}", f"its own digest, {record.get(SEAL)}", "other content"))
    return record


def _check_fields(record: dict) -> None:
    """Raises KeyError or TypeError unless the fields that a pretraining reads are there and of their types."""
    if not all(isinstance(name, str) for name in [*record["formats"]]) or isinstance(record["formats"], str):
        raise TypeError("formats")
    if not all(isinstance(record[key], dict) for key in ORIGIN_KEYS & record.keys()):
        raise TypeError("source and operator")
    if not isinstance(record.get("content", {}), dict):
        raise TypeError("content")
    fit = record.get("fit")
    if fit is not None:
        samples, digest, end = fit["eval"]["samples"], fit["eval"]["digest"], fit["losses"]["end"]
        if type(samples) is not int or not isinstance(digest, str) or type(end) not in (int, float):
            raise TypeError("fit")


def write(folder: Path, record: dict) -> dict:
    """Writes a record with its version; returns it as written."""
    versioned = seal({**record, "version": VERSION})
    write_json(folder / RECORD_NAME, versioned)
    return versioned
