"""Curves of the report: smoothing, savings, and the page in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_ligo.report import curves, report_page
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


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("chromium"), reason="apt-get install chromium")
def test_the_page_in_a_browser(tmp_path):
    """Nothing is fetched, nothing is wider than the window, and the picture is there."""
    runs = made_up_runs()
    page = tmp_path / "report.html"
    page.write_text(report_page.render_page(build_table(runs), curves.draw_png(runs)))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dump = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "60% saved" in dump.stdout or "saved, the fit behind a start included" in dump.stdout
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]+"', dump.stdout)
    picture = tmp_path / "page.png"
    window = ["--window-size=1400,1700", f"--screenshot={picture}"]
    subprocess.run([*browser, *window, page.as_uri()], capture_output=True, timeout=120, check=True)
    pixels = imread(picture)
    assert pixels.shape[:2] == (1700, 1400) and pixels[..., :3].std() > 0.05
