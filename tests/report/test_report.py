"""Tests the report on small synthetic runs, with the records that fits, hand-offs and pretraining runs write."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.config.run_config import LargeSection, OperatorSection, RunConfig
from megatron_ligo.export import provenance
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.handoff import build_growth_record
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.report import write_report
from megatron_ligo.report.curves import held_out_curve, training_curve
from megatron_ligo.report.report_table import HEADINGS, ReportTable, build_table
from megatron_ligo.report.run_records import FIT_NOT_GIVEN, FIT_ON_OTHER_SAMPLES, REUSES_FIT_SAMPLES, read_runs
from megatron_ligo.training.guard.stop_record import write_stop
from megatron_ligo.training.metrics import Metrics
from tests.tiny_models import hf_llama, llama_config, memory_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = llama_config()
LARGE = LargeSection(num_layers=5, hidden_size=32, ffn_size=48, num_heads=8, num_kv_heads=4)
LAYOUT = {"tp": 2, "pp": 1, "dp": 2, "zero": 3}
EVAL = {"samples": 8, "digest": "0123456789abcdef"}
OTHER_EVAL = {"samples": 4, "digest": "fedcba9876543210"}
STEP_FLOPS = {"fit": 3e6, "pretrain": 1e6}


def write_steps(folder: Path, count: int, flops: float, **last: float | str) -> None:
    with Metrics(folder, True, count) as metrics:
        for step in range(1, count + 1):
            extra = last if step == count else {}
            metrics.log(step, 5.0 - step / 10, 1e-3, tokens=64, flops=flops, seconds=0.5, grad_norm=0.1, **extra)


def write_fit(folder: Path, end_loss: float = 3.5) -> operator_file.OperatorFile:
    operator = build_initial_operator(SMALL, LARGE, OperatorSection(width_init="copy", depth_init="stack"))
    write_steps(folder, 6, STEP_FLOPS["fit"])
    record = {
        "source": {"path": "small", "format": "hf"},
        "step": 6,
        "losses": {"start": 4.25, "end": end_loss},
        "eval": EVAL,
        "layout": {"tp": 2, "pp": 2, "dp": 1, "zero": 1},
        "peak_memory_bytes": [2**30, 3 * 2**30],
        "config": RunConfig().to_dict(),
        "versions": {"torch": "2"},
    }
    operator_file.write_operator(
        operator, ((name, operator.tensor(name)) for name in operator.shapes()), folder / "operator", record
    )
    return operator_file.OperatorFile(folder / "operator")


def write_handoff_record(folder: Path, operator) -> None:
    folder.mkdir()
    grown = GrownReader(operator, memory_of(hf_llama(SMALL), SMALL))
    provenance.write(
        folder, {**build_growth_record(grown), "large": grown.model_config.to_json(), "formats": ["hf"], "versions": {}}
    )


def write_pretraining(
    folder: Path, handoff: Path | None, count: int = 4, evaluation=EVAL, model_config=SMALL, **losses
) -> None:
    folder.mkdir()
    if count:
        write_steps(folder, count, STEP_FLOPS["pretrain"], eval_loss=3.0)
    overrides = [f'pretrain.start="{handoff}"'] if handoff else []
    table = RunConfig.load(None, overrides).to_dict()
    record = {
        "run": {"pretrain": table["pretrain"], "data": table["data"], "processes": {"dp": 2}},
        "dims": model_config.to_json(),
        "step": count,
        "losses": {"start": 3.5, "end": 3.0, **losses},
        "eval": evaluation,
        "layout": LAYOUT,
        "peak_memory_bytes": [2**29] * 4,
        "versions": {},
    }
    write_json(folder / "pretrain.json", record)


@pytest.fixture
def journey(tmp_path):
    """A small model's loss, a fit, its hand-off, the hand-off of an unfitted start, and a pretraining run from each."""
    fitted = write_fit(tmp_path / "fit")
    write_handoff_record(tmp_path / "grown", fitted)
    write_handoff_record(
        tmp_path / "stacked", build_initial_operator(SMALL, LARGE, OperatorSection(depth_init="stack"))
    )
    large = fitted.large
    write_pretraining(tmp_path / "small", None, 0)
    on_both = {"fit": 3.5, "start_on_fit_batch": 3.5000005}
    write_pretraining(tmp_path / "pre_grown", tmp_path / "grown", model_config=large, **on_both)
    write_pretraining(tmp_path / "pre_stacked", tmp_path / "stacked", model_config=large, start=4.4)
    return [tmp_path / name for name in ("small", "fit", "grown", "stacked", "pre_grown", "pre_stacked")]


def cells(table: ReportTable) -> dict[str, dict[str, str]]:
    """Returns the cells by run and heading."""
    return {row[0]: dict(zip(HEADINGS, row, strict=True)) for row in table.rows}


def test_each_stage_has_its_loss(journey):
    rows = cells(build_table(read_runs(journey)))
    small, fit, grown, pre, plain = (rows[name] for name in ("small", "fit", "grown", "pre_grown", "pre_stacked"))
    assert small["step 0"] == "3.5000" and small["FLOPs"] == small["seconds"] == "-"
    assert (fit["initialised"], fit["after the fit"], fit["step 0"]) == ("4.2500", "3.5000", "-")
    assert (fit["seconds"], fit["peak memory per rank"]) == ("3.0", "3.00 GiB")
    assert fit["layout"] == "TP 2 x PP 2 x DP 1, ZeRO 1, fp32"
    assert fit["start"] == "copy / stack" and grown["start"] == "copy / stack, fitted 6 steps"
    assert grown["after the fit"] == "3.5000" and rows["stacked"]["after the fit"] == "-"
    assert (pre["initialised"], pre["after the fit"], pre["step 0"]) == ("4.2500", "3.5000", "3.5000")
    assert pre["after N steps"] == "3.0000 (N = 4)" and pre["start"] == "grown (copy / stack, fitted 6 steps)"
    assert (plain["initialised"], plain["step 0"]) == ("4.4000", "4.4000")
    assert pre["layout"] == "TP 2 x PP 1 x DP 2, ZeRO 3, fp32"


def test_parameters_match_the_models(journey):
    runs = read_runs(journey)
    assert runs[1].parameters == sum(p.numel() for p in hf_llama(runs[1].model_config).parameters())
    assert runs[0].parameters == sum(p.numel() for p in hf_llama(SMALL).parameters())


def test_a_start_pays_for_its_fit(journey):
    runs = {run.name: run for run in read_runs(journey)}
    assert runs["pre_grown"].prior_flops == 6 * STEP_FLOPS["fit"] and runs["pre_stacked"].prior_flops == 0
    assert training_curve(runs["pre_grown"], x="flops")[0] == [18e6 + 1e6 * step for step in (1, 2, 3, 4)]
    assert training_curve(runs["pre_stacked"], x="flops")[0] == [1e6, 2e6, 3e6, 4e6]
    assert held_out_curve(runs["pre_grown"], x="flops") == ([18e6, 22e6], [3.5, 3.0])
    assert held_out_curve(runs["fit"], x="step") == ([0, 6], [4.25, 3.5])
    assert cells(build_table(list(runs.values())))["pre_grown"]["FLOPs"] == "4e+06 (+ 1.8e+07 before)"


def test_a_fit_that_is_not_given_is_not_free(journey):
    runs = {run.name: run for run in read_runs([path for path in journey if path.name != "fit"])}
    assert FIT_NOT_GIVEN in runs["pre_grown"].notes and runs["pre_grown"].prior_flops is None
    assert cells(build_table(list(runs.values())))["pre_grown"]["FLOPs"] == "4e+06 (+ ? before)"


def test_a_fit_whose_cost_is_recorded_is_counted_without_its_folder(journey):
    folder = next(path for path in journey if path.name == "grown")
    record = provenance.read(folder)
    provenance.write(folder, {**record, "fit": {**record["fit"], "flops": 7e6}})
    runs = {run.name: run for run in read_runs([path for path in journey if path.name not in ("fit", "grown")])}
    assert FIT_NOT_GIVEN not in runs["pre_grown"].notes and runs["pre_grown"].prior_flops == 7e6


def test_losses_on_other_samples_stay_separate(journey, tmp_path):
    table = build_table(read_runs(journey))
    assert table.groups == [5, 1]
    # No note says that sets differ: the one on set A comes first.
    assert "8 held-out samples of 256 tokens" in table.notes[0] and EVAL["digest"] in table.notes[0]
    write_pretraining(tmp_path / "elsewhere", tmp_path / "grown", evaluation=OTHER_EVAL)
    runs = read_runs([*journey, tmp_path / "elsewhere"])
    table = build_table(runs)
    row = cells(table)["elsewhere"]
    assert table.groups == [5, 1, 1] and row["evaluation set"] == "B"
    assert row["after the fit"] == row["initialised"] == "-"
    assert "A and B" in table.notes[0]
    assert any(OTHER_EVAL["digest"] in note for note in table.notes)
    assert [run.name for run in runs if FIT_ON_OTHER_SAMPLES in run.notes] == ["elsewhere"]
    assert f"elsewhere: {FIT_ON_OTHER_SAMPLES}." in table.notes


def test_training_on_the_samples_of_the_fit_is_noted(journey):
    def noted_runs() -> list[str]:
        return [run.name for run in read_runs(journey) if REUSES_FIT_SAMPLES in run.notes]

    assert noted_runs() == ["pre_grown"]
    path = journey[4] / "pretrain.json"
    record = json.loads(path.read_text())
    for section, key, value in (("data", "seed", 5), ("pretrain", "first_sample", 6 * 8)):
        run = {**record["run"], section: {**record["run"][section], key: value}}
        path.write_text(json.dumps({**record, "run": run}))
        assert noted_runs() == []
    run = {**record["run"], "pretrain": {**record["run"]["pretrain"], "first_sample": 6 * 8 - 1}}
    path.write_text(json.dumps({**record, "run": run}))
    assert noted_runs() == ["pre_grown"]


def test_the_losses_at_the_handoff_are_reported(journey):
    runs = {run.name: run for run in read_runs(journey)}
    assert runs["pre_grown"].handoff_losses == (3.5, 3.5000005)
    notes = build_table(list(runs.values())).notes
    (note,) = (note for note in notes if "3.500000" in note and "3.500001" in note)
    assert "pre_grown" in note and "+5.0e-07" in note


def test_the_spread_over_the_samples_is_with_the_last_loss(journey):
    runs = [replace(run, deviation=0.08 if run.kind == "pretraining" else None) for run in read_runs(journey)]
    table = build_table(runs)
    error = 0.08 / math.sqrt(EVAL["samples"])
    assert cells(table)["pre_grown"]["after N steps"] == f"3.0000 ± {error:.4f} (N = 4)"
    assert cells(table)["small"]["step 0"] == f"3.5000 ± {error:.4f}"
    assert "±" not in cells(table)["pre_grown"]["step 0"] and any(note.startswith("±") for note in table.notes)


def test_few_steps_are_called_a_demonstration(journey, tmp_path):
    warning = build_table(read_runs(journey)).warning
    assert "demonstration" in warning and "6 steps" in warning
    write_pretraining(tmp_path / "long", None, 1000)
    assert "demonstration" not in build_table(read_runs([tmp_path / "long"])).warning


def test_an_unfinished_run_shows_its_progress(tmp_path):
    write_steps(tmp_path / "going", 3, 1e6)
    row = cells(build_table(read_runs([tmp_path / "going"])))["going"]
    assert row["kind"] == "unfinished" and row["seconds"] == "1.5" and row["layout"] == row["step 0"] == "-"


def test_anomalies_are_noted(tmp_path):
    write_steps(tmp_path / "run", 3, 1e6, texts={"anomaly": "step 3: expected loss at most 4, found 9."}, skipped=1)
    write_stop(tmp_path / "run", 4, "step 4: expected loss at most 4, found 9.")
    notes = " ".join(build_table(read_runs([tmp_path / "run"])).notes)
    assert "1 anomaly, 1 of its steps skipped; the first at step 3 (step 3: expected loss at most 4, found 9)." in notes
    assert "it stopped at an anomaly before the update of step 4; it waits for its user." in notes
    (tmp_path / "run/anomalies.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"anomalies\.json: expected the anomalies of a run"):
        read_runs([tmp_path / "run"])


def test_a_loss_that_is_not_finite_is_shown(tmp_path):
    write_fit(tmp_path / "fit", end_loss=float("nan"))
    assert cells(build_table(read_runs([tmp_path / "fit"])))["fit"]["after the fit"].startswith("nan")
    write_report([tmp_path / "fit"], tmp_path / "out", Console(file=io.StringIO()))


class PageParser(HTMLParser):
    """Checks that tags are balanced; collects addresses and the texts of cells."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.cells = [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_is_self_contained(journey, tmp_path):
    (tmp_path / "<b>&run").mkdir()
    write_steps(tmp_path / "<b>&run", 2, 1e6)
    terminal = io.StringIO()
    write_report([*journey, tmp_path / "<b>&run"], tmp_path / "out", Console(file=terminal, width=200))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.png"]
    page = PageParser()
    page.feed((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and len(page.addresses) == 1
    head, _, picture = page.addresses[0].partition(",")
    assert head == "data:image/png;base64"
    for png in (io.BytesIO(base64.b64decode(picture)), tmp_path / "out" / "report.png"):
        pixels = imread(png)
        assert pixels.shape[0] > 400 and pixels.shape[1] > 1000 and pixels.std() > 0.05
    assert page.cells.count("pre_grown") == 1 and "<b>&run" in page.cells
    assert re.search(r"step 0\s.*3\.5000", terminal.getvalue()) and "demonstration" in terminal.getvalue()


def test_every_damaged_record_is_reported_at_once(journey, tmp_path):
    (journey[0] / "pretrain.json").write_text("{")
    record = json.loads((journey[1] / "operator" / "operator.json").read_text())
    record["losses"]["end"] = "3.5"
    record["layout"] = 4
    (journey[1] / "operator" / "operator.json").write_text(json.dumps(record))
    (journey[2] / "growth.json").write_text('{"version": 99}')
    lines = (journey[4] / "metrics.jsonl").read_text().splitlines()
    (journey[4] / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]) + "\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as error:
        write_report([*journey, tmp_path / "empty", tmp_path / "none"], tmp_path / "out")
    problems = {problem.where: problem for problem in error.value.problems if isinstance(problem, Problem)}
    operator = journey[1] / "operator" / "operator.json"
    assert f"{journey[0] / 'pretrain.json'}" in problems
    assert problems[f"{operator}: losses.end"].found == "'3.5'"
    assert problems[f"{operator}: layout"].found == "4"
    assert problems[f"{tmp_path / 'empty'}"].expected.startswith("metrics.jsonl, pretrain.json")
    assert problems[f"{tmp_path / 'none'}"].found == "nothing"
    text = str(error.value)
    for part in (f"{journey[2] / 'growth.json'}", f"{journey[4] / 'metrics.jsonl'}, line 2"):
        assert part in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"step": "1", "loss": 2}', '{"step": 1, "loss": 2}', "[1]\n", "\udcff"])
def test_invalid_metrics_are_refused(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_bytes((line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as error:
        read_runs([tmp_path])
    assert any("metrics.jsonl" in problem for problem in error.value.problems)


@pytest.mark.parametrize("samples", ["Infinity", "NaN", "2.5", "true"])
def test_samples_are_counted_in_whole_numbers(tmp_path, samples):
    (tmp_path / "pretrain.json").write_text(f'{{"eval": {{"samples": {samples}, "digest": "0"}}}}')
    with pytest.raises(CheckpointError, match=r"pretrain\.json: eval\.samples: expected a whole number"):
        read_runs([tmp_path])


def test_runs_of_one_name_get_the_parent_folder(tmp_path):
    for name in ("a", "b"):
        write_steps(tmp_path / name / "run", 1, 1e6)
    assert [run.name for run in read_runs([tmp_path / "a" / "run", tmp_path / "b" / "run"])] == ["a/run", "b/run"]


def test_a_folder_given_twice_is_refused(tmp_path):
    write_steps(tmp_path / "run", 1, 1e6)
    with pytest.raises(CheckpointError) as error:
        read_runs([tmp_path / "run", tmp_path / "b" / ".." / "run"])
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == (str(tmp_path / "run"), "2 times")


def run_command(*arguments: Path | str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/report.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_the_command(journey, tmp_path):
    done = run_command(*journey, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "pre_grown" in done.stdout and (tmp_path / "out" / "report.html").is_file()


def test_the_command_without_a_run(tmp_path):
    done = run_command(tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode == 2 and f"{tmp_path / 'none'}: expected" in done.stderr
    assert "Traceback" not in done.stderr
