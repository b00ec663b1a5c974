"""The report's table and notes as text, shared by the terminal, the page and the picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ligo.common.terminal_text import printable
from megatron_ligo.report.flops_savings import find_savings
from megatron_ligo.report.run_records import EvaluationSet, RecordedRun

MISSING = "-"
# Shorter runs say nothing about a method.
MIN_STEPS_FOR_A_RESULT = 1000
HEADINGS = (
    "run", "kind", "model", "start", "evaluation set", "initialised", "after the fit", "step 0", "after N steps",
    "FLOPs", "tokens", "peak rate", "seconds", "tokens per second", "peak memory per rank", "layout",
)  # fmt: skip
# Headings of losses -> keys of RecordedRun.losses.
LOSSES = {"initialised": "initialised", "after the fit": "fitted", "step 0": "step 0", "after N steps": "end"}


@dataclass(frozen=True)
class ReportTable:
    """rows: cells in the order of HEADINGS, grouped by evaluation set. groups: number of rows in each group."""

    rows: list[tuple[str, ...]]
    groups: list[int]
    warning: str
    notes: list[str]


def build_table(runs: Sequence[RecordedRun]) -> ReportTable:
    evaluation_sets = list(dict.fromkeys(run.evaluation_set for run in runs if run.evaluation_set))
    letters: dict[EvaluationSet | None, str] = {each: _letter(number) for number, each in enumerate(evaluation_sets)}
    rows, groups = [], []
    for evaluation_set in [*evaluation_sets, None]:
        members = [run for run in runs if run.evaluation_set == evaluation_set]
        rows += [_format_cells(run, letters.get(run.evaluation_set, MISSING)) for run in members]
        groups += [len(members)] if members else []
    return ReportTable(rows, groups, _format_warning(runs), _format_notes(runs, letters))


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"set {number + 1}"


def _format_cells(run: RecordedRun, letter: str) -> tuple[str, ...]:
    losses = [_format_loss(run, key) for key in LOSSES.values()]
    return (
        run.name,
        run.kind,
        _format_model(run),
        run.initialised_by or MISSING,
        letter,
        *losses,
        _format_flops(run),
        _format_number(run.total("tokens"), ",.0f"),
        _format_number(max((row["lr"] for row in run.metrics if row.get("lr") is not None), default=None), ".2e"),
        _format_number(run.total("seconds"), ".1f"),
        _format_throughput(run),
        MISSING if run.peak_memory is None else f"{run.peak_memory / 2**30:.2f} GiB",
        _format_layout(run),
    )


def _format_loss(run: RecordedRun, key: str) -> str:
    text = _format_number(run.losses.get(key), ".4f")
    if key == ("end" if run.steps else "step 0") and run.deviation is not None and run.evaluation_set:
        text += f" ± {run.deviation / math.sqrt(run.evaluation_set.samples):.4f}"
    return f"{text} (N = {run.steps})" if key == "end" and text != MISSING else text


def _format_number(value: float | None, form: str) -> str:
    if value is None:
        return MISSING
    return format(value, form) if math.isfinite(value) else f"{value} (not finite)"


def _format_model(run: RecordedRun) -> str:
    config = run.model_config
    if config is None:
        return MISSING
    heads = f"{config.num_heads}/{config.num_kv_heads}"
    return f"{run.parameters / 1e6:.3g}M: {config.num_layers} x {config.hidden_size}, heads {heads}"


def _format_flops(run: RecordedRun) -> str:
    own = _format_number(run.total("flops"), ".3g")
    if own == MISSING or run.prior_flops == 0:
        return own
    prior = "?" if run.prior_flops is None else _format_number(run.prior_flops, ".3g")
    return f"{own} (+ {prior} before)"


def _format_throughput(run: RecordedRun) -> str:
    """Returns the median of the steps, so that the first ones and pauses do not count."""
    rows = [{"tokens": 0, "seconds": 0.0}, *run.metrics]
    steps = [
        (row["tokens"] - before["tokens"]) / (row["seconds"] - before["seconds"])
        for before, row in pairwise(rows)
        if None not in (before.get("seconds"), row.get("seconds"), before.get("tokens"), row.get("tokens"))
        and row["seconds"] > before["seconds"]
    ]
    return _format_number(median(steps) if steps else None, ",.0f")


def _format_layout(run: RecordedRun) -> str:
    if not run.layout:
        return MISSING
    sizes = " x ".join(f"{name.upper()} {run.layout.get(name, '?')}" for name in ("tp", "pp", "dp"))
    precision = f", {run.precision}" if run.precision else ""
    return f"{sizes}, ZeRO {run.layout.get('zero', '?')}{precision}"


def _format_warning(runs: Sequence[RecordedRun]) -> str:
    longest = max((run.steps for run in runs), default=0)
    if longest < MIN_STEPS_FOR_A_RESULT:
        return (
            f"A demonstration, not a result: the longest run here has {longest} steps. It shows that the parts work "
            "together; it does not show which initialisation of a large model is better."
        )
    return "One run of each kind: a difference no larger than that between two seeds is noise."


def _format_notes(runs: Sequence[RecordedRun], letters: dict[EvaluationSet | None, str]) -> list[str]:
    notes = []
    if len(letters) > 1:
        names = " and ".join(letters.values())
        notes.append(f"Evaluation sets {names} hold different samples: do not compare their losses.")
    for evaluation_set, letter in letters.items():
        tokens = f" of {evaluation_set.seq_length} tokens" if evaluation_set.seq_length else ""
        notes.append(
            f"Evaluation set {letter}: {evaluation_set.samples} held-out samples{tokens}, digest "
            f"{evaluation_set.digest}."
        )
    if any(run.losses and not run.evaluation_set for run in runs):
        notes.append(
            "Evaluation set '-': the run did not record its held-out samples. Its losses compare with no other run's."
        )
    for run in runs:
        if run.handoff_losses:
            fitted, again = run.handoff_losses
            notes.append(
                f"{run.name}, hand-off on the fit's samples: {fitted:.6f} at the end of the fit, {again:.6f} at step "
                f"0, difference {again - fitted:+.1e}."
            )
        notes += [f"{run.name}: {note}." for note in run.notes]
        versions = run.record.get("versions")
        if isinstance(versions, dict):
            notes.append(f"{run.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}.")
    if any(run.deviation is not None for run in runs):
        notes.append(
            "±: standard error of a loss, by its spread over the held-out samples. The difference of two runs on the "
            "same samples is more certain than that."
        )
    notes += [f"{saving}." for saving in find_savings(runs)]
    return [
        *notes,
        "Losses are in nats per token, of image classifiers in nats per image. A fit evaluates in fp32, a pretraining "
        "run in its own precision (see layout).",
        "FLOPs are counted from the shapes, summed over all ranks. 'before': the FLOPs of the fit behind a run's "
        "start. The training of the small model is not included. Seconds are those of the steps only.",
    ]


def print_table(table: ReportTable, console: Console) -> None:
    """Prints the warning, the table and the notes. Runs are columns: names and layouts are long, runs are few."""
    grid = Table(show_header=False)
    for _ in range(len(table.rows) + 1):
        grid.add_column(overflow="fold")
    for number, heading in enumerate(HEADINGS):
        cells = [Text(printable(row[number])) for row in table.rows]
        grid.add_row(heading, *cells, end_section=heading in ("evaluation set", "after N steps"))
    console.print(f"{table.warning}\n", markup=False, highlight=False)
    console.print(grid)
    for note in table.notes:
        console.print(printable(f"- {note}"), markup=False, highlight=False)
