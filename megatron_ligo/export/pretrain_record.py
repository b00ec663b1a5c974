"""pretrain.json: the settings, the model and the losses of a pretraining run."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.common.file_digest import SEAL, is_intact, seal
from megatron_ligo.export.provenance import PRETRAIN_RECORD


def write_pretrain_record(output: Path, record: dict) -> None:
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / PRETRAIN_RECORD, seal(record))


def read_pretrain_record(output: Path) -> dict:
    """Returns what a run needs to resume: run, dims, grown, step. CheckpointError if the record is damaged or gone."""
    path = output / PRETRAIN_RECORD
    try:
        record = read_json(path, finite=False)
        if SEAL in record and not is_intact(record):
            raise CheckpointError(Problem(f"{path}", f"its own digest, {record[SEAL]}", "other content"))
        return {key: record[key] for key in ("run", "dims", "grown", "step")}
    except FileNotFoundError:
        actual = "nothing"
    except (ValueError, KeyError, TypeError) as error:
        actual = f"{error!r}"
    hint = "Choose another --output."
    raise CheckpointError(Problem(f"{path}", "the record of the run that is resumed", actual, hint))
