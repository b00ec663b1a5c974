"""The table and the notes of a report, as text: what the terminal, the page and the picture all show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ligo.report.run_records import EvaluationSet, RecordedRun

MISSING = "-"
# Fewer steps than this say nothing of a method.
FEW_STEPS = 1000
HEADINGS = (
    "run", "what", "model", "from", "measured on", "initialised", "after the fit", "step 0", "after N steps",
    "FLOPs", "seconds", "peak memory a rank", "layout",
)  # fmt: skip
LOSSES = {"initialised": "initialised", "after the fit": "fitted", "step 0": "step 0", "after N steps": "end"}


@dataclass(frozen=True)
class ReportTable:
    """rows: cells in the order of HEADINGS, grouped by what the losses were measured on (`groups`: rows a group)."""

    rows: list[tuple[str, ...]]
    groups: list[int]
    warning: str
    notes: list[str]


def build_table(runs: Sequence[RecordedRun]) -> ReportTable:
    batches = list(dict.fromkeys(run.evaluation_set for run in runs if run.evaluation_set))
    letters: dict[EvaluationSet | None, str] = {batch: _batch_letter(number) for number, batch in enumerate(batches)}
    rows, groups = [], []
    for batch in [*batches, None]:
        members = [run for run in runs if run.evaluation_set == batch]
        rows += [_format_cells(run, letters.get(run.evaluation_set, MISSING)) for run in members]
        groups += [len(members)] if members else []
    return ReportTable(rows, groups, _format_warning(runs), _format_notes(runs, batches, letters))


def _batch_letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"batch {number + 1}"


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
        _format_number(run.total("seconds"), ".1f"),
        MISSING if run.memory is None else f"{run.memory / 2**30:.2f} GiB",
        _format_layout(run),
    )


def _format_loss(run: RecordedRun, key: str) -> str:
    text = _format_number(run.losses.get(key), ".4f")
    return f"{text} (N = {run.steps})" if key == "end" and text != MISSING else text


def _format_number(value: float | None, form: str) -> str:
    if value is None:
        return MISSING
    return format(value, form) if math.isfinite(value) else f"{value} (no number)"


def _format_model(run: RecordedRun) -> str:
    if run.model_config is None:
        return MISSING
    model_config = run.model_config
    heads = f"{model_config.num_heads}/{model_config.num_kv_heads}"
    return f"{run.parameters / 1e6:.3g}M: {model_config.num_layers} x {model_config.hidden_size}, heads {heads}"


def _format_flops(run: RecordedRun) -> str:
    own = _format_number(run.total("flops"), ".3g")
    if own == MISSING or run.prior_flops == 0:
        return own
    return f"{own} (+ {_format_number(run.prior_flops, '.3g') if run.prior_flops is not None else '?'} before)"


def _format_layout(run: RecordedRun) -> str:
    if not run.layout:
        return MISSING
    sizes = " x ".join(f"{name.upper()} {run.layout.get(name, '?')}" for name in ("tp", "pp", "dp"))
    precision = f", {run.precision}" if run.precision else ""
    return f"{sizes}, ZeRO {run.layout.get('zero', '?')}{precision}"


def _format_warning(runs: Sequence[RecordedRun]) -> str:
    longest = max((run.steps for run in runs), default=0)
    if longest < FEW_STEPS:
        return (
            f"A demonstration, not a result: the longest run here has {longest} steps. It shows that the parts work "
            "together; it does not show which way of starting a large model is better."
        )
    return "One run of each kind: a difference that is not larger than that between two seeds means nothing."


def _format_notes(
    runs: Sequence[RecordedRun], batches: Sequence[EvaluationSet], letters: dict[EvaluationSet | None, str]
) -> list[str]:
    notes = []
    if len(batches) > 1:
        named = " and ".join(letters[batch] for batch in batches)
        notes.append(f"Losses under {named} were measured on different samples: do not compare one with another.")
    for batch in batches:
        of = f" of {batch.seq_length} tokens" if batch.seq_length else ""
        notes.append(f"{letters[batch]}: {batch.samples} held-out samples{of}, digest {batch.digest}.")
    if any(run.losses and not run.evaluation_set for run in runs):
        notes.append("Measured on '-': the run did not record its held-out samples; compare its losses with no other.")
    for run in runs:
        if run.handoff_losses:
            fitted, again = run.handoff_losses
            text = f"{run.name}, hand-over on the fit's own samples: {fitted:.6f} at the end of the fit, "
            notes.append(f"{text}{again:.6f} at step 0, difference {again - fitted:+.1e}.")
        notes += [f"{run.name}: {note}." for note in run.notes]
    return [
        *notes,
        "Losses are nats a token, of images nats a label. A fit evaluates in fp32, a pretraining in its own precision "
        "(see layout).",
        "FLOPs are counted from the shapes, all ranks together; 'before' is the fit that a start comes from. What the "
        "small model cost is in no row. Seconds are those of the steps alone.",
    ]


def print_table(told: ReportTable, console: Console) -> None:
    """Prints the table with a column for each run (names and layouts are long, runs are few) and its notes."""
    table = Table(show_header=False)
    for _ in range(len(told.rows) + 1):
        table.add_column(overflow="fold")
    for number, heading in enumerate(HEADINGS):
        cells = [Text(row[number]) for row in told.rows]
        table.add_row(heading, *cells, end_section=heading in ("measured on", "after N steps"))
    console.print(f"{told.warning}\n", markup=False, highlight=False)
    console.print(table)
    for note in told.notes:
        console.print(f"- {note}", markup=False, highlight=False)
