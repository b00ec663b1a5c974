"""Draws the loss against steps, tokens, FLOPs and hours, alone or above the table."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from megatron_ligo.report.flops_savings import find_savings
from megatron_ligo.report.report_table import HEADINGS, LOSSES, ReportTable
from megatron_ligo.report.run_records import RecordedRun

# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", ":", "-.")
# Above this ratio of losses, the scale is logarithmic.
MAX_LINEAR_RATIO = 3
SAVING_BOX = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
Curve = tuple[list[float], list[float]]  # x, y
# What a curve is drawn against -> its label.
X_LABELS = {"step": "step", "tokens": "tokens", "flops": "FLOPs of all ranks, the fit's included", "hours": "hours"}
# A smoothed curve averages over this part of its steps; shorter runs are drawn as they are.
SMOOTHED_PART = 1 / 40
# A curve has no more marks of held-out losses.
MAX_CIRCLES = 25
HELD_OUT_MARKS = {"linestyle": ":", "marker": "o", "markerfacecolor": "white"}


def draw_png(runs: Sequence[RecordedRun], table: ReportTable | None = None) -> bytes:
    """Draws the curves and, if `table` is given, the table and its notes below them. Returns a PNG."""
    height = 9.6 if table is None else 5.2 + (0.34 * (len(HEADINGS) + 1) + 0.24 * len(table.notes) + 1.0)
    figure = Figure(figsize=(13, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    if table is None:
        panels = figure.subplots(2, 2).flatten()
    else:
        upper, lower = figure.subfigures(2, 1, height_ratios=(5.2, height - 5.2))
        panels = upper.subplots(1, 2)
        _draw_table(lower.subplots(), table)
        upper.suptitle(fill(table.warning, 130), fontsize=10, color="#8a1c00")
    for axes, x in zip(panels, X_LABELS if table is None else ("step", "flops"), strict=True):
        _draw_panel(axes, runs, x)
    # Outside the panels, where it hides no curve.
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, edgecolor="none")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_panel(axes: Axes, runs: Sequence[RecordedRun], x: str) -> None:
    drawn = [run for run in runs if run.metrics or "step 0" in run.losses]
    losses = []
    for number, run in enumerate(drawn):
        if x == "flops" and run.prior_flops is None:
            continue
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        trained, held_out = training_curve(run, x), held_out_curve(run, x)
        label = f"{run.name} ({run.kind})"
        losses += trained[1] + held_out[1]
        if not trained[0]:
            # A model that was only evaluated, such as the small one: the line that the others have to pass.
            axes.axhline(held_out[1][0], color=colour, linestyle=style, linewidth=1.0, label=f"{label}: not trained")
            continue
        smoothed = smooth(trained[1])
        if smoothed != trained[1]:
            axes.plot(*trained, color=colour, linewidth=0.6, alpha=0.25)
        marker = "." if smoothed == trained[1] else ""
        axes.plot(trained[0], smoothed, color=colour, linestyle=style, marker=marker, markersize=4, label=label)
        apart = max(len(held_out[0]) // MAX_CIRCLES, 1)
        axes.plot(*held_out, color=colour, linewidth=0.9, markersize=7, markevery=apart, **HELD_OUT_MARKS)
    for saving in find_savings(drawn) if x == "flops" else ():
        axes.annotate(
            "", (saving.flops, saving.loss), (saving.reference_flops, saving.loss), arrowprops={"arrowstyle": "->"}
        )
        middle = (saving.flops + saving.reference_flops) / 2
        axes.annotate(
            f"{saving.part:.0%} saved", (middle, saving.loss), ha="center", va="bottom", fontsize=8, bbox=SAVING_BOX
        )
    axes.set_title(f"Loss against {X_LABELS[x]}")
    axes.set_xlabel(X_LABELS[x])
    _set_scale(axes, losses)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not losses:
        axes.text(0.5, 0.5, "no steps recorded", ha="center", va="center", transform=axes.transAxes)
    elif x == "step":
        axes.plot([], [], color="#555555", label="lines: training batches, smoothed in long runs")
        axes.plot([], [], color="#555555", label="circles: held-out samples", **HELD_OUT_MARKS)


def smooth(losses: Sequence[float]) -> list[float]:
    """Returns losses averaged over the recent ones, exponentially; as they are if there are few."""
    window = len(losses) * SMOOTHED_PART
    if window < 2:
        return list(losses)
    keep, average, weight, smoothed = 1 - 1 / window, 0.0, 0.0, []
    for loss in losses:
        average, weight = keep * average + (1 - keep) * loss, keep * weight + 1 - keep
        smoothed.append(average / weight)
    return smoothed


def _set_scale(axes: Axes, losses: list[float]) -> None:
    is_logarithmic = bool(losses) and min(losses) > 0 and max(losses) / min(losses) > MAX_LINEAR_RATIO
    axes.set_ylabel("loss, nats per token" + (" (logarithmic)" if is_logarithmic else ""))
    if is_logarithmic:
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(ScalarFormatter())
        axes.tick_params(axis="y", which="minor", labelsize=7)


def training_curve(run: RecordedRun, x: str) -> Curve:
    """Returns the losses on the training batches against a key of X_LABELS."""
    rows = [row for row in run.metrics if _is_drawable(row.get("loss"))]
    return [x_value(run, row, x) for row in rows], [row["loss"] for row in rows]


def held_out_curve(run: RecordedRun, x: str) -> Curve:
    """Returns the held-out losses before the first step, during the run, and after the last step."""
    first, last = ("initialised", "fitted") if run.kind == "fit" else ("step 0", "end")
    points = [(dict.fromkeys(("step", "tokens", "flops", "seconds"), 0), run.losses.get(first))]
    points += [(row, row.get("eval_loss")) for row in run.metrics]
    if run.metrics and run.metrics[-1].get("eval_loss") is None:
        points.append((run.metrics[-1], run.losses.get(last)))
    drawable = [(x_value(run, row, x), loss) for row, loss in points if _is_drawable(loss)]
    return [place for place, _ in drawable], [loss for _, loss in drawable]


def x_value(run: RecordedRun, row: dict, x: str) -> float:
    """Returns where a row of a run lies. FLOPs include those of the fit behind the run's start."""
    if x == "hours":
        return row["seconds"] / 3600
    return row["flops"] + (run.prior_flops or 0) if x == "flops" else row[x]


def _is_drawable(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


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
