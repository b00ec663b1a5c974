"""OUTPUT/anomalies.json: the anomalies at which a run has stopped, and those that its user has accepted since."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, NumbersError, Problem

STOPS_FILE = "anomalies.json"
VERSION = 1
FLAG = "--resume-after-anomaly"


@dataclass(frozen=True)
class Stop:
    """A step, counted from 1, before whose update a run has stopped, and why."""

    step: int
    message: str
    accepted: bool = False


def read_stops(output: Path) -> list[Stop]:
    """Reads the stops of a run, oldest first. CheckpointError if the file is not one of these."""
    path = output / STOPS_FILE
    if not path.is_file():
        return []
    try:
        record = read_json(path, finite=False)
        if record["version"] != VERSION:
            raise CheckpointError(Problem(f"{path}", f"version {VERSION}", record["version"]))
        stops = [Stop(**entry) for entry in record["stops"]]
        if not all(type(stop.step) is int and isinstance(stop.message, str) for stop in stops):
            raise TypeError("a step and a message")
        return stops
    except (ValueError, KeyError, TypeError) as error:
        hint = "It says why the run has stopped. Restore it, or remove it if you know."
        raise CheckpointError(Problem(f"{path}", "the anomalies of a run", f"{error!r}", hint)) from None


def write_stop(output: Path, step: int, message: str) -> None:
    """Adds a stop, so that the run is not resumed before its user has accepted it."""
    _write(output, [*read_stops(output), Stop(step, message)])


def check_stops(output: Path, accept: bool) -> list[Stop]:
    """Returns the accepted stops of a run that is started. NumbersError if there are others and `accept` is not set."""
    stops = read_stops(output)
    pending = [stop for stop in stops if not stop.accepted]
    if pending and not accept:
        last = pending[-1]
        hint = f"See what caused it. {FLAG} resumes from the last checkpoint and passes this step."
        raise NumbersError(f"{output} has stopped: {last.message} {hint}")
    if pending:
        stops = [replace(stop, accepted=True) for stop in stops]
        _write(output, stops)
    return stops


def _write(output: Path, stops: list[Stop]) -> None:
    write_json(output / STOPS_FILE, {"version": VERSION, "stops": [asdict(stop) for stop in stops]})
