"""Draws the loss against step and against FLOPs, alone or above the table."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from megatron_ligo.report.report_table import HEADINGS, LOSSES, ReportTable
from megatron_ligo.report.run_records import RecordedRun

# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
# Above this ratio of losses, the scale is logarithmic.
MAX_LINEAR_RATIO = 3
Curve = tuple[list[float], list[float]]  # x, y
HELD_OUT_MARKS = {"linestyle": ":", "marker": "o", "markerfacecolor": "white"}


def draw_png(runs: Sequence[RecordedRun], table: ReportTable | None = None) -> bytes:
    """Draws the curves and, if `table` is given, the table and its notes below them. Returns a PNG."""
    height = 5.2 + (0 if table is None else 0.34 * (len(HEADINGS) + 1) + 0.24 * len(table.notes) + 1.0)
    figure = Figure(figsize=(13, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if table is None:
        panels = figure.subplots(1, 2)
    else:
        upper, lower = figure.subfigures(2, 1, height_ratios=(5.2, height - 5.2))
        panels = upper.subplots(1, 2)
        _draw_table(lower.subplots(), table)
        upper.suptitle(fill(table.warning, 130), fontsize=10, color="#8a1c00")
    _draw_panel(panels[0], runs, by_flops=False)
    _draw_panel(panels[1], runs, by_flops=True)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_panel(axes: Axes, runs: Sequence[RecordedRun], by_flops: bool) -> None:
    drawn = [run for run in runs if run.metrics or "step 0" in run.losses]
    losses = []
    for number, run in enumerate(drawn):
        if by_flops and run.prior_flops is None:
            continue
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        trained, held_out = training_curve(run, by_flops), held_out_curve(run, by_flops)
        label = f"{run.name} ({run.kind})"
        axes.plot(*trained, color=colour, linestyle=style, marker=".", markersize=4, linewidth=1.4, label=label)
        axes.plot(*held_out, color=colour, linewidth=0.9, markersize=7, **HELD_OUT_MARKS)
        losses += trained[1] + held_out[1]
    axes.set_title("Loss against FLOPs, including the fit behind a start" if by_flops else "Loss against step")
    axes.set_xlabel("FLOPs of all ranks" if by_flops else "step")
    _set_scale(axes, losses)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not losses:
        axes.text(0.5, 0.5, "no steps recorded", ha="center", va="center", transform=axes.transAxes)
    elif not by_flops:
        axes.plot([], [], color="#555555", marker=".", markersize=4, label="lines: training batches")
        axes.plot([], [], color="#555555", label="circles: held-out samples", **HELD_OUT_MARKS)
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")


def _set_scale(axes: Axes, losses: list[float]) -> None:
    is_logarithmic = bool(losses) and min(losses) > 0 and max(losses) / min(losses) > MAX_LINEAR_RATIO
    axes.set_ylabel("loss, nats per token" + (" (logarithmic)" if is_logarithmic else ""))
    if is_logarithmic:
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(ScalarFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=7)


def training_curve(run: RecordedRun, by_flops: bool) -> Curve:
    """Returns the losses on the training batches. FLOPs include those of the fit behind the run's start."""
    rows = [row for row in run.metrics if _is_drawable(row.get("loss"))]
    return [_x_value(run, row, by_flops) for row in rows], [row["loss"] for row in rows]


def held_out_curve(run: RecordedRun, by_flops: bool) -> Curve:
    """Returns the held-out losses before the first step, during the run, and after the last step."""
    first, last = ("initialised", "fitted") if run.kind == "fit" else ("step 0", "end")
    points = [({"step": 0, "flops": 0}, run.losses.get(first))]
    points += [(row, row.get("eval_loss")) for row in run.metrics]
    if run.metrics and run.metrics[-1].get("eval_loss") is None:
        points.append((run.metrics[-1], run.losses.get(last)))
    drawable = [(_x_value(run, row, by_flops), loss) for row, loss in points if _is_drawable(loss)]
    return [x for x, _ in drawable], [y for _, y in drawable]


def _is_drawable(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _x_value(run: RecordedRun, row: dict, by_flops: bool) -> float:
    return row["flops"] + run.prior_flops if by_flops else row["step"]


def _draw_table(axes: Axes, table: ReportTable) -> None:
    """Draws one column per run: names and layouts are long, runs are few."""
    axes.axis("off")
    cells = [[row[number] for row in table.rows] for number in range(1, len(HEADINGS))]
    grid = axes.table(
        cellText=[[fill(cell, 34) for cell in line] for line in cells],
        rowLabels=HEADINGS[1:],
        colLabels=[row[0] for row in table.rows],
        loc="upper center",
        cellLoc="center",
        bbox=(0.12, 0.30, 0.88, 0.70),
    )
    grid.auto_set_font_size(False)
    grid.set_fontsize(9 if len(table.rows) <= 5 else 7)
    for (line, _), cell in grid.get_celld().items():
        cell.set_edgecolor("#cccccc")
        if line and HEADINGS[line] in LOSSES:
            cell.set_facecolor("#f2f6fa")
    notes = "\n".join(fill(note, 190, initial_indent="- ", subsequent_indent="  ") for note in table.notes)
    axes.text(0.0, 0.27, notes, fontsize=8, va="top", transform=axes.transAxes)
