import json
import math
import mmap
import os
import pty
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.export.metrics_rows import METRICS_KEYS, read_metrics
from megatron_ligo.training.metrics import Metrics, peak_memory_bytes

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, first: int, last: int, total: int = 10, done: int = 0, **extra) -> None:
    with Metrics(folder, True, total, done) as metrics:
        for step in range(first, last + 1):
            metrics.log(step, 5.0 - step / 10, 1e-3, tokens=100, flops=1e6, seconds=0.5, grad_norm=0.1, **extra)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_line_per_step(tmp_path, capsys):
    run(tmp_path, 1, 3)
    logged = rows(tmp_path)
    assert [tuple(row) for row in logged] == [METRICS_KEYS] * 3
    assert logged[2] == {
        "step": 3, "loss": 4.7, "lr": 1e-3, "tokens": 300, "flops": 3e6, "seconds": 1.5, "grad_norm": 0.1
    }  # fmt: skip
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "step 2/10  loss 4.8000  lr 1.00e-03  200 tokens/s  left 0:00:04"


def test_a_line_is_written_as_soon_as_it_is_logged(tmp_path):
    metrics = Metrics(tmp_path, True, 10)
    metrics.log(1, 5.0, 1e-3, 100, 1e6, 0.5, 0.1, eval_loss=4.0)
    assert rows(tmp_path)[0]["eval_loss"] == 4.0
    metrics.close()
    metrics.close()


def test_disabled_metrics_write_nothing(tmp_path, capsys):
    with Metrics(tmp_path / "x", False, 10) as metrics:
        metrics.log(1, 5.0, 1e-3, 100, 1e6, 0.5, 0.1)
    assert not (tmp_path / "x").exists() and capsys.readouterr().out == ""


def test_a_pipe_in_place_of_the_metrics_is_refused(tmp_path):
    """Opening it would wait for a reader."""
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(CheckpointError, match="not a regular file"):
        Metrics(tmp_path, True, 10)


def test_a_resumed_run_writes_the_same_file_as_an_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", 1, 8)
    run(tmp_path / "killed", 1, 6)
    path = tmp_path / "killed" / "metrics.jsonl"
    with path.open("a") as stream:
        stream.write('{"step": 7, "lo')
    run(tmp_path / "killed", 5, 8, done=4)
    assert path.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert {entry.name for entry in path.parent.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_run_from_the_start_drops_old_lines(tmp_path):
    run(tmp_path, 1, 6)
    run(tmp_path, 1, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2] and rows(tmp_path)[0]["tokens"] == 100


def test_events(tmp_path):
    run(tmp_path, 1, 6, eval_loss=2.0)
    run(tmp_path, 5, 8, done=4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))
    assert events.Scalars("tokens_per_second")[0].value == 200 and events.Scalars("eval_loss")[0].value == 2


def test_what_is_no_number_is_null(tmp_path):
    with Metrics(tmp_path, True, 1) as metrics:
        metrics.log(1, math.nan, 1e-3, 100, 1e6, 0.5, math.inf)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["grad_norm"] is None


def test_a_damaged_file_is_named(tmp_path):
    run(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "[]", lines[2], ""]))
    with pytest.raises(CheckpointError, match="line 2"):
        run(tmp_path, 4, 4, done=3)


BAD_ROWS = [
    '{"step": "x"}',
    '{"step": 1, "loss": "3"}',
    "[1]",
    '{"step": 1, "tokens": {}}',
    "[" * 100_000,
    '{"step": null}',
]


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_an_altered_row_is_one_error(tmp_path, row):
    run(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{row}\n{path.read_text()}")
    with pytest.raises(CheckpointError, match="line 1: expected a JSON object") as raised:
        Metrics(tmp_path, True, 10, 2)
    assert len(str(raised.value)) < 1000


def test_a_file_that_is_no_text_is_one_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(CheckpointError, match="the metrics of a run, in UTF-8"):
        read_metrics(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_metrics(path)


def test_an_anomaly_is_a_column_of_text(tmp_path):
    run(tmp_path, 1, 2, texts={"anomaly": "step 1: expected a, found b."}, skipped=1)
    assert [row["anomaly"] for row in rows(tmp_path)] == ["step 1: expected a, found b."] * 2
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(tmp_path)


def test_a_bar_on_a_terminal(tmp_path):
    """A real terminal (a pty): one live line and no scroll of plain ones."""
    body = (
        "import sys; from megatron_ligo.training.metrics import Metrics\n"
        "with Metrics(sys.argv[1], True, 10) as m:\n"
        "    for s in range(1, 4): m.log(s, 5.0, 1e-3, 100, 1e6, 0.5, 0.1)\n"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen([sys.executable, "-c", body, tmp_path], stdout=theirs, stderr=subprocess.PIPE, env=env)
    os.close(theirs)
    text = b""
    try:
        while block := os.read(ours, 4096):
            text += block
    except OSError:  # the other end is closed
        pass
    assert process.wait(timeout=60) == 0, process.stderr.read()
    assert b"step 3/10" in text and b"200 tokens/s" in text and b"left 0:00:04" in text


def test_peak_memory_is_remembered():
    # Mapped, for the allocator keeps what it is given back when it likes to.
    block = mmap.mmap(-1, 64 << 20)
    block.write(b"1" * (64 << 20))
    stored = psutil.Process().memory_info().rss
    peak = peak_memory_bytes()
    block.close()
    # The kernel's counts may be some pages apart.
    slack = 1 << 20
    assert 64 << 20 < stored <= peak + slack
    assert psutil.Process().memory_info().rss < stored and peak_memory_bytes() >= peak - slack
