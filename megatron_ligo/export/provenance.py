"""growth.json: where a grown model comes from. Written last into a hand-off, which is not whole without it."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, Problem

RECORD_NAME = "growth.json"
VERSION = 1
# What says which start a grown model is: the small model's digest; the operator's, and its settings.
ORIGIN_KEYS = {"source", "operator"}


def read(folder: Path) -> dict | None:
    """The record of a hand-off; None where the folder is none. Raises CheckpointError if it cannot be read."""
    path = folder / RECORD_NAME
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        found = record["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(Problem(f"{path}", "a record of ours", f"{error!r}")) from None
    if found != VERSION:
        raise CheckpointError(Problem(f"{path}", f"version {VERSION}", found))
    return record


def write(folder: Path, record: dict) -> dict:
    """Writes the record with its version; returns what was written."""
    whole = {**record, "version": VERSION}
    write_json(folder / RECORD_NAME, whole)
    return whole
