"""Experiment trackers: every figure of metrics.jsonl, by the tracker's own package, which stays optional.

Each logs to its server if one is configured (WANDB_API_KEY, MLFLOW_TRACKING_URI, COMET_API_KEY), else into the run's
folder. A tracker that fails during a run is switched off, and the run goes on: metrics.jsonl has all values.
"""

from __future__ import annotations

import csv
import importlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import TrainingSection

log = logging.getLogger(__name__)

Row = Mapping[str, float | str | None]
# No summary on the terminal, and nothing of the user's code, packages and machine.
COMET_OPTIONS = {
    "display_summary_level": 0,
    "log_code": False,
    "log_git_metadata": False,
    "log_git_patch": False,
    "log_env_details": False,
    "auto_metric_logging": False,
    "auto_param_logging": False,
    "auto_output_logging": False,
}
# Tracker -> the package that it needs.
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml"}


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError with every tracker whose package is not installed."""
    errors = ErrorCollector("trackers", ConfigError)
    for name in names:
        package = PACKAGES.get(name)
        if package and find_spec(package) is None:
            errors.add(name, f"the package {package}", "not installed", f"pip install {package.replace('_', '-')}")
    errors.raise_if_any()


class Tracker(ABC):
    """One tracker of one run, on rank 0."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, object]):
        self.folder = folder.resolve()
        self.open(project, f"{self.folder.parent.name}/{self.folder.name}", settings)

    @abstractmethod
    def open(self, project: str, name: str, settings: Mapping[str, object]) -> None:
        """Starts or resumes the run."""

    @abstractmethod
    def add(self, step: int, row: Row) -> None:
        """Logs the row of a step, without its empty columns."""

    def close(self) -> None:  # noqa: B027 - a file needs none
        """Ends the run."""


class CsvTracker(Tracker):
    """OUTPUT/metrics.csv. A column that is new begins the file anew, with all rows so far."""

    def open(self, project: str, name: str, settings: Mapping[str, object]) -> None:
        self._path = self.folder / "metrics.csv"
        self._rows: list[dict] = []
        if self._path.is_file():
            with self._path.open(newline="") as file:
                self._rows = list(csv.DictReader(file))
        self._columns = list(self._rows[0]) if self._rows else []

    def add(self, step: int, row: Row) -> None:
        before = len(self._rows)
        # A resumed run repeats the steps after its checkpoint.
        self._rows = [kept for kept in self._rows if int(kept["step"]) < step]
        self._rows.append(dict(row))
        new = [key for key in row if key not in self._columns]
        self._columns += new
        if new or len(self._rows) != before + 1:
            self._write(self._rows, "w")
        else:
            self._write([row], "a")

    def _write(self, rows: Sequence[Row], mode: str) -> None:
        with self._path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


class WandbTracker(Tracker):
    def open(self, project: str, name: str, settings: Mapping[str, object]) -> None:
        wandb = importlib.import_module("wandb")
        mode = None if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE") else "offline"
        self._run = wandb.init(
            project=project,
            name=name,
            config=dict(settings),
            dir=str(self.folder),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(silent=mode == "offline"),
        )

    def add(self, step: int, row: Row) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowTracker(Tracker):
    def open(self, project: str, name: str, settings: Mapping[str, object]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            # mlflow-skinny comes without the packages of a database, and takes folders if it is told so.
            database = f"sqlite:///{self.folder / 'mlflow.db'}"
            has_database = find_spec("sqlalchemy") and find_spec("alembic")
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            self._mlflow.set_tracking_uri(database if has_database else (self.folder / "mlruns").as_uri())
        self._mlflow.set_experiment(project)
        self._mlflow.start_run(run_name=name)
        self._mlflow.log_dict(dict(settings), "config.json")

    def add(self, step: int, row: Row) -> None:
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class CometTracker(Tracker):
    def open(self, project: str, name: str, settings: Mapping[str, object]) -> None:
        comet = importlib.import_module("comet_ml")
        if os.environ.get("COMET_API_KEY"):
            self._experiment = comet.Experiment(project_name=project, **COMET_OPTIONS)
        else:
            self._experiment = comet.OfflineExperiment(
                project_name=project, offline_directory=str(self.folder), **COMET_OPTIONS
            )
        self._experiment.set_name(name)
        self._experiment.log_parameters(dict(settings))

    def add(self, step: int, row: Row) -> None:
        self._experiment.log_metrics(dict(row), step=step)

    def close(self) -> None:
        self._experiment.end()


TRACKER_CLASSES: dict[str, type[Tracker]] = {
    "csv": CsvTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "comet": CometTracker,
}


class TrackerList:
    """The trackers of a run. One that fails is switched off, with a warning."""

    def __init__(self, trackers: Sequence[Tracker]):
        self._trackers = list(trackers)

    def add(self, row: Row) -> None:
        """Logs a row of metrics.jsonl with every tracker."""
        filled = {key: value for key, value in row.items() if value is not None}
        for tracker in list(self._trackers):
            try:
                tracker.add(int(row["step"]), filled)
            except Exception as error:  # whatever a tracker's package raises, the run goes on
                log.warning("%s is off from here: %s: %s", type(tracker).__name__, type(error).__name__, error)
                self._trackers.remove(tracker)

    def close(self) -> None:
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:  # whatever a tracker's package raises, the run is done
                log.warning("%s did not close: %s", type(tracker).__name__, error)


def open_trackers(section: TrainingSection, folder: Path) -> TrackerList:
    """Opens the trackers of the run in a folder; those of a run that is resumed go on."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = asdict(section)
    return TrackerList([_open_tracker(name, folder, section.tracker_project, settings) for name in section.trackers])


def _open_tracker(name: str, folder: Path, project: str, settings: Mapping[str, object]) -> Tracker:
    """Opens one tracker. Raises ConfigError if its package refuses, in whatever way."""
    try:
        return TRACKER_CLASSES[name](folder, project, settings)
    except Exception as error:  # each package has errors of its own
        hint = "Leave it out of trackers, or see its own settings."
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(Problem(f"tracker {name}", "a tracker that starts", reason, hint)) from error
