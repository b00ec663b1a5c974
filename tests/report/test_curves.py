"""Curves of the report: smoothing, savings, and the page in a real browser."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_ligo.report import curves
from megatron_ligo.report.curves import smooth
from megatron_ligo.report.flops_savings import find_savings
from megatron_ligo.report.report_table import HEADINGS, build_table
from megatron_ligo.report.run_records import EvaluationSet, RecordedRun


def held_out_run(name: str, losses: list[float], flops: float, prior: float = 0.0, eval_every: int = 1) -> RecordedRun:
    rows = [
        {
            "step": step,
            "loss": loss,
            "eval_loss": None if step % eval_every else loss,
            "flops": step * flops,
            "tokens": 10 * step,
            "seconds": 2.0 * step,
        }
        for step, loss in enumerate(losses[1:], 1)
    ]  # fmt: skip
    evaluation_set = EvaluationSet(4, "digest")
    return RecordedRun(
        name, Path(name), "pretraining", evaluation_set=evaluation_set, losses={"step 0": losses[0]}, metrics=rows,
        prior_flops=prior,
    )  # fmt: skip


def test_savings_are_read_off_the_curves():
    """The grown run passes the scratch run's last loss half-way between its first two steps, after a fit."""
    scratch = held_out_run("scratch", [6.0, 5.0, 4.0], flops=10.0)
    grown = held_out_run("grown", [5.0, 4.5, 3.5], flops=4.0, prior=2.0)
    (saving,) = find_savings([scratch, grown])
    assert (saving.run, saving.reference, saving.loss) == ("grown", "scratch", 4.0)
    assert saving.flops == pytest.approx(2 + 4 + 2) and saving.part == pytest.approx(0.6)
    assert find_savings([scratch]) == [] == find_savings([scratch, held_out_run("late", [6.0, 5.0, 4.0], 30.0)])
    table = build_table([scratch, grown])
    assert any("60% saved" in note for note in table.notes)
    cells = dict(zip(HEADINGS, table.rows[0], strict=True))
    assert (cells["tokens"], cells["tokens per second"]) == ("20", "5")


def test_long_curves_are_smoothed():
    noisy = [3.0 + (-1) ** step for step in range(400)]
    assert smooth(noisy[:40]) == noisy[:40]
    assert all(abs(loss - 3.0) < 0.2 for loss in smooth(noisy)[50:])
    assert smooth([2.0] * 400) == pytest.approx([2.0] * 400)


def made_up_runs() -> list[RecordedRun]:
    random = np.random.default_rng(0)
    steps = np.arange(401)
    scratch = 2 + 4 * np.exp(-steps / 90) + random.normal(0, 0.08, len(steps))
    grown = 1.9 + 2 * np.exp(-steps / 90) + random.normal(0, 0.08, len(steps))
    small = RecordedRun("small", Path("small"), "pretraining", losses={"step 0": 3.6})
    return [
        held_out_run("scratch", [*scratch], 1e12, eval_every=50),
        held_out_run("grown", [*grown], 1e12, 2e13, 50),
        small,
    ]


def test_a_model_that_is_not_trained_is_a_line():
    with_line, without = (curves.draw_png(runs) for runs in (made_up_runs(), made_up_runs()[:2]))
    assert with_line.startswith(b"\x89PNG") and with_line != without
