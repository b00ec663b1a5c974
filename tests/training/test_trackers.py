"""Trackers get every figure of metrics.jsonl, and one that is not installed is refused before anything starts."""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import FitSection, RunConfig
from megatron_ligo.training.fit import Fit
from megatron_ligo.training.tracking import trackers
from tests.tiny_models import hf_llama, llama_config
from tests.training.test_pretrain import make_pair


def fit(settings: dict, output: str) -> None:
    job = Fit(RunConfig.from_dict(settings), Path(output))
    job.run()
    job.engine.engine.destroy()


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_fits_losses_are_in_every_record(pools, tmp_path):
    """At the start, in between and at the end: in metrics.jsonl, TensorBoard and a tracker."""
    small = llama_config()
    hf_llama(small).save_pretrained(tmp_path / "small")
    data = {"train": [make_pair(tmp_path / "train", 0)], "valid": [make_pair(tmp_path / "valid", 1)], "seq_length": 16}
    run = {"steps": 3, "eval_every": 2, "global_batch_size": 2, "eval_samples": 2, "trackers": ["csv"]}
    table = {"small": {"path": str(tmp_path / "small")}, "large": {"num_layers": 4}, "fit": run, "data": data}
    pools(1).run(fit, settings=table, output=str(tmp_path / "fit"))
    rows = [json.loads(line) for line in (tmp_path / "fit" / "metrics.jsonl").read_text().splitlines()]
    losses = json.loads((tmp_path / "fit" / "operator" / "operator.json").read_text())["losses"]
    assert rows[0]["start_eval_loss"] == losses["start"] and rows[2]["eval_loss"] == losses["last"]
    assert ["eval_loss" in row for row in rows] == [False, True, True]
    events = EventAccumulator(str(tmp_path / "fit" / "tensorboard")).Reload().Scalars("eval_loss")
    assert [event.step for event in events] == [0, 2, 3]
    assert events[0].value == pytest.approx(losses["start"]) and events[2].value == pytest.approx(losses["last"])
    tracked = rows_of(tmp_path / "fit" / "metrics.csv")
    assert [int(row["step"]) for row in tracked] == [0, 1, 2, 3] and float(tracked[0]["eval_loss"]) == losses["start"]
    for row, logged in zip(rows, tracked[1:], strict=True):
        assert {key: value for key, value in row.items() if value is not None}.items() <= {
            key: float(value) if "." in value or "e" in value else int(value) for key, value in logged.items() if value
        }.items()


def test_a_resumed_run_repeats_its_last_rows(tmp_path):
    section = replace(FitSection(), trackers=("csv",))
    first = trackers.open_trackers(section, tmp_path)
    for step in (1, 2, 3):
        first.add({"step": step, "loss": step / 2, "lr": None})
    second = trackers.open_trackers(section, tmp_path)
    second.add({"step": 2, "loss": 9.0, "eval_loss": 1.0})
    second.add({"step": 3, "loss": 8.0})
    assert [(row["step"], row["loss"], row["eval_loss"]) for row in rows_of(tmp_path / "metrics.csv")] == [
        ("1", "0.5", ""), ("2", "9.0", "1.0"), ("3", "8.0", ""),
    ]  # fmt: skip


def test_a_tracker_that_is_not_installed_is_one_error(monkeypatch):
    monkeypatch.setitem(trackers.PACKAGES, "wandb", "no_such_package")
    monkeypatch.setitem(trackers.PACKAGES, "comet", "no_such_package_either")
    with pytest.raises(ConfigError) as error:
        trackers.check_trackers(["csv", "wandb", "comet"])
    assert [problem.where for problem in error.value.problems] == ["wandb", "comet"]
    assert "pip install" in str(error.value)


def test_a_tracker_that_does_not_start_is_one_error(tmp_path, monkeypatch):
    class Refusing(trackers.CsvTracker):
        def open(self, project, name, settings):
            raise KeyError("a store of its own")

    monkeypatch.setitem(trackers.TRACKER_CLASSES, "csv", Refusing)
    with pytest.raises(ConfigError, match="tracker csv: expected a tracker that starts, found KeyError"):
        trackers.open_trackers(replace(FitSection(), trackers=("csv",)), tmp_path)


@pytest.mark.long
def test_comet_offline(tmp_path, monkeypatch, capfd):
    """Every figure is in its archive, nothing of the user's code, and nothing on the terminal."""
    pytest.importorskip("comet_ml")
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    opened = trackers.open_trackers(replace(FitSection(), trackers=("comet",)), tmp_path)
    opened.add({"step": 1, "loss": 1.5, "eval_loss": 0.75})
    opened.close()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as content:
        names = content.namelist()
        messages = content.read("messages.json").decode()
    assert all(part in messages for part in ('"loss"', '"eval_loss"', "1.5", "0.75"))
    assert not any("test_trackers" in name for name in names) and "COMET INFO:     steps" not in capfd.readouterr().err


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, caplog):
    section = replace(FitSection(), trackers=("csv",))
    failing = trackers.open_trackers(section, tmp_path / "run")
    (tmp_path / "run").rmdir()
    failing.add({"step": 1, "loss": 1.0})
    failing.add({"step": 2, "loss": 1.0})
    assert caplog.text.count("CsvTracker is off from here") == 1


@pytest.mark.long
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    opened = trackers.open_trackers(replace(FitSection(), trackers=("wandb",)), tmp_path)
    opened.add({"step": 1, "loss": 1.5, "anomaly": "a spike"})
    opened.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"loss" in file.read_bytes() and b"a spike" in file.read_bytes()


@pytest.mark.long
def test_mlflow_without_a_server(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    opened = trackers.open_trackers(replace(FitSection(), trackers=("mlflow",)), tmp_path)
    opened.add({"step": 1, "loss": 1.5})
    opened.add({"step": 2, "loss": 0.5, "eval_loss": 0.75})
    run = mlflow.active_run().info.run_id
    opened.close()
    client = mlflow.MlflowClient()
    assert [(point.step, point.value) for point in client.get_metric_history(run, "loss")] == [(1, 1.5), (2, 0.5)]
    assert client.get_metric_history(run, "eval_loss")[0].value == 0.75
