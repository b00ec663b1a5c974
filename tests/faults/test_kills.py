"""Runs that are killed, stopped or starved at random moments, with the real commands on real ranks."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.commands import Run

STEPS = 30
LAYOUTS = {
    "fit, PP2": ("fit", "fit.parallel.pp=2"),
    "fit, ZeRO 3": ("fit", "fit.parallel.zero=3"),
    "fit, ZeRO 2": ("fit", "fit.parallel.zero=2"),
    "pretrain, TP2": ("pretrain", "pretrain.parallel.tp=2"),
}


def rows(output: Path) -> list[dict]:
    """What the run says of each step, without the clock's part."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def losses(output: Path, tool: str) -> tuple:
    """Everything that a run leaves and that must not depend on what befell it."""
    if tool == "fit":
        record = json.loads((output / "operator/operator.json").read_text())
        return record["losses"], (output / "operator/operator.safetensors").read_bytes()
    return (json.loads((output / "pretrain.json").read_text())["losses"],)


def ended(output: Path, tool: str) -> tuple:
    return rows(output), losses(output, tool)


@pytest.mark.parametrize("case", LAYOUTS)
def test_whatever_befalls_a_run_it_ends_as_the_undisturbed_one(config, tmp_path, case):
    """SIGKILL of all ranks, SIGTERM to one, SIGKILL of one: every number is the same, bit for bit."""
    tool, layout = LAYOUTS[case]
    with Run(tool, config, tmp_path / "whole", layout) as run:
        assert run.ends() == [0, 0], run.said(0)
    draw = random.Random(case)
    moments = sorted(draw.sample(range(2, STEPS - 4), 3))
    output = tmp_path / "killed"
    with Run(tool, config, output, layout) as run:
        run.reaches(moments[0])
        run.signal(signal.SIGKILL, 0, 1)
    with Run(tool, config, output, layout) as run:
        run.reaches(moments[1])
        run.signal(signal.SIGTERM, draw.randrange(2))
        assert run.ends(30) == [143, 143]
        assert "SIGTERM: saved after step" in run.said(0) and "Traceback" not in run.said(0) + run.said(1)
    victim = draw.randrange(2)
    with Run(tool, config, output, layout) as run:
        run.reaches(moments[2])
        began = time.monotonic()
        run.signal(signal.SIGKILL, victim)
        codes = run.ends(30)
        assert codes[victim] == -9 and codes[1 - victim] == 2
        assert time.monotonic() - began < 20
        if victim == 1:
            assert "rank 1 has ended, without a word" in run.said(0)
        assert "Traceback" not in run.said(1 - victim)
    with Run(tool, config, output, layout) as run:
        assert run.ends() == [0, 0], run.said(0)
    assert ended(output, tool) == ended(tmp_path / "whole", tool)
    assert [row["step"] for row in rows(output)] == list(range(1, STEPS + 1))
    # Nothing is left over of what was begun.
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step_28", f"step_{STEPS}"]


def test_a_rank_that_hangs_is_named_when_the_time_is_over(config, tmp_path):
    with Run("fit", config, tmp_path / "a", "fit.parallel.tp=2", "fit.timeout_minutes=0.08") as run:
        run.reaches(3)
        run.signal(signal.SIGSTOP, 1)
        run.ranks[0].join(40)
        assert run.ranks[0].exitcode == 2, run.said(0)
        assert "rank 1 does not answer, without a word" in run.said(0)
