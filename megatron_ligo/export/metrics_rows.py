"""The rows of metrics.jsonl: what they hold, how they are read, and the digest by which a checkpoint binds them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import xxhash

from megatron_ligo.common.atomic_files import parse_json, read_text
from megatron_ligo.common.errors import CheckpointError, Problem

METRICS_FILE = "metrics.jsonl"
METRICS_KEYS = ("step", "loss", "lr", "tokens", "flops", "seconds", "grad_norm")
# A run of a month logs a few hundred bytes for each of its millions of steps.
MAX_METRICS_BYTES = 1 << 36
# The columns of text: what is wrong with a step, and which changed inputs its user has accepted before it.
ANOMALY, ACCEPTED_CHANGES = "anomaly", "accepted_changes"
TEXT_KEYS = (ANOMALY, ACCEPTED_CHANGES)
# The column that differs between runs of the same numbers.
SECONDS = "seconds"
# The entry of a run's state that binds the rows up to its step: {rows, digest, tokens, flops}.
METRICS_STATE = "metrics"
RESTORE_HINT = (
    "The curves and the report would be others. Bring it back, choose another --output, or pass --accept-changed-data, "
    "which is recorded."
)


class RowsDigest:
    """The number of rows and their digest, without the seconds; grows row by row."""

    def __init__(self) -> None:
        self.rows, self._hash = 0, xxhash.xxh3_128()

    def add(self, row: Mapping) -> None:
        values = {key: value for key, value in row.items() if key != SECONDS}
        self.rows += 1
        self._hash.update(json.dumps(values).encode() + b"\n")

    @property
    def value(self) -> str:
        return self._hash.hexdigest()


def read_metrics(path: str | Path) -> list[dict]:
    """Reads the rows of a metrics.jsonl; skips an incomplete last line. CheckpointError if another line is invalid."""
    path = Path(path)
    try:
        lines = read_text(path, MAX_METRICS_BYTES).split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(Problem(f"{path}", "the metrics of a run, in UTF-8", error)) from None
    rows = []
    for number, line in enumerate(lines, 1):
        row = _parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            problem = Problem(
                f"{path}, line {number}", f"a JSON object with {', '.join(METRICS_KEYS)}", repr(line[:60])
            )
            raise CheckpointError(problem)
        # The last line is empty, or its write was interrupted.
    return rows


def find_changed_rows(run: Path, state: Mapping, step: int) -> list[Problem]:
    """Returns a problem if the rows of steps 1 to `step` are not those that the run had when it saved `state`.

    A state of an earlier version binds none. CheckpointError if its entry is not a run's, or a line is no row.
    """
    saved = state.get(METRICS_STATE)
    if saved is None:
        return []
    where = f"{run / METRICS_FILE}"
    kinds = {"rows": int, "digest": str, "tokens": int | float, "flops": int | float}
    if not isinstance(saved, dict) or not all(isinstance(saved.get(key), kind) for key, kind in kinds.items()):
        raise CheckpointError(Problem(f"{where}: its entry in the checkpoint", ", ".join(kinds), f"{saved!r}"))
    current = RowsDigest()
    for row in read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).exists() else []:
        if 1 <= row["step"] <= step:
            current.add(row)
    if (current.rows, current.value) == (saved["rows"], saved["digest"]):
        return []
    expected = f"{saved['rows']} rows up to step {step}, of digest {saved['digest']}"
    return [Problem(where, expected, f"{current.rows} of digest {current.value}", RESTORE_HINT)]


def _parse_row(line: str) -> dict | None:
    """Returns a row whose step is an integer and whose other columns are numbers or none; None for anything else."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = (value for key, value in row.items() if key not in TEXT_KEYS)
    if not all(value is None or isinstance(value, int | float) for value in numbers):
        return None
    return {"step": row["step"], **row}
