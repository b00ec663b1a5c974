"""record.json of a run's checkpoint: the run's state, and size and digest of every file. It is written last."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import SEAL, hash_file_part, is_intact, seal
from megatron_ligo.distributed.parallel_dims import EngineLayout

RECORD = "record.json"
# Version 2 has neither its own digest nor the run's inputs.
VERSION, VERSIONS = 3, (2, 3)


def describe_file(path: Path) -> dict:
    """Returns the size (bytes) and digest of a file, as the record states them."""
    size = path.stat().st_size
    return {"size": size, "digest": hash_file_part(path, 0, size)}


def write_run_record(folder: Path, record: dict) -> None:
    write_json(folder / RECORD, seal({"version": VERSION, **record}))


def read_run_record(path: Path) -> dict:
    """Reads a checkpoint's record. CheckpointError if it is damaged, incomplete or of an unknown version."""
    try:
        record = read_json(path, finite=False)
        if record["version"] not in VERSIONS:
            raise CheckpointError(Problem(f"{path}", f"version {VERSION}", record["version"]))
        if record["version"] > 2 and not is_intact(record):
            raise CheckpointError(Problem(f"{path}", f"its own digest, {record.get(SEAL)}", "other content"))
        files = {str(name): (int(entry["size"]), str(entry["digest"])) for name, entry in record["files"].items()}
        EngineLayout.from_json(record["layout"])
        if not files or not isinstance(record["state"], dict):
            raise KeyError("files and state")
    except OSError as error:
        raise CheckpointError(Problem(f"{path}", "the record of a checkpoint", error.strerror)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(Problem(f"{path}", "the record of a checkpoint", f"{error!r}")) from None
    return record


def check_step(checkpoint: Path, record: dict, step: int) -> None:
    """Raises CheckpointError unless the record in a folder is that of the step in the folder's name."""
    if record.get("step") != step:
        hint = "It was renamed or copied: give it its own name."
        raise CheckpointError(Problem(f"{checkpoint}", f"the checkpoint of step {step}", f"{record.get('step')}", hint))


def check_recorded_file(path: Path, expected: dict, errors: ErrorCollector) -> bool:
    """Adds an error unless a file has the size and digest that the record states; returns True if it has."""
    before = len(errors.problems)
    if path.exists() and not path.is_file():
        # Reading a pipe would block.
        errors.add(f"{path}", "a file", "something else")
        return False
    try:
        actual = describe_file(path)
    except OSError as error:
        errors.add(f"{path}", f"{expected['size']} bytes", error.strerror)
        return False
    if actual != expected:
        errors.add(f"{path}", f"{expected['size']} bytes, digest {expected['digest']}", f"{actual}")
    return len(errors.problems) == before
