"""The report's notes on the anomalies of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_ligo.common.errors import ErrorCollector, LigoError
from megatron_ligo.training.guard import stop_record


def describe_anomalies(folder: Path, rows: Sequence[dict], errors: ErrorCollector) -> tuple[str, ...]:
    """Returns a note on the anomalies in the rows of metrics.jsonl, and one on the anomaly at which the run stopped."""
    notes = []
    anomalies = [(row["step"], row["anomaly"]) for row in rows if isinstance(row.get("anomaly"), str)]
    if anomalies:
        skipped = sum(bool(row.get("skipped")) for row in rows)
        step, text = anomalies[0]
        count = f"{len(anomalies)} {'anomaly' if len(anomalies) == 1 else 'anomalies'}, {skipped} of its steps skipped"
        notes.append(f"{count}; the first at step {step} ({text.rstrip('.')})")
    try:
        stops = stop_record.read_stops(folder)
    except LigoError as error:
        errors.add_message(str(error))
        return tuple(notes)
    for stop in stops:
        ending = "resumed by its user" if stop.accepted else "it waits for its user"
        notes.append(f"it stopped at an anomaly before the update of step {stop.step}; {ending}")
    return tuple(notes)
