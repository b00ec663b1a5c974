"""The table and the notes of a report, as text: what the terminal, the page and the picture all show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ligo.report.run_records import Eval, Run

NONE = "-"
# Fewer steps than this say nothing of a method.
FEW_STEPS = 1000
HEADINGS = (
    "run", "what", "model", "from", "measured on", "initialised", "after the fit", "step 0", "after N steps",
    "FLOPs", "seconds", "peak memory a rank", "layout",
)  # fmt: skip
LOSSES = {"initialised": "initialised", "after the fit": "fitted", "step 0": "step 0", "after N steps": "end"}


@dataclass(frozen=True)
class Told:
    """rows: cells in the order of HEADINGS, grouped by what the losses were measured on (`groups`: rows a group)."""

    rows: list[tuple[str, ...]]
    groups: list[int]
    warning: str
    notes: list[str]


def tell(runs: Sequence[Run]) -> Told:
    batches = list(dict.fromkeys(run.eval for run in runs if run.eval))
    letters: dict[Eval | None, str] = {batch: _letter(number) for number, batch in enumerate(batches)}
    rows, groups = [], []
    for batch in [*batches, None]:
        members = [run for run in runs if run.eval == batch]
        rows += [_row(run, letters.get(run.eval, NONE)) for run in members]
        groups += [len(members)] if members else []
    return Told(rows, groups, _warning(runs), _notes(runs, batches, letters))


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else f"batch {number + 1}"


def _row(run: Run, letter: str) -> tuple[str, ...]:
    losses = [_loss(run, key) for key in LOSSES.values()]
    return (
        run.name,
        run.kind,
        _model(run),
        run.begun or NONE,
        letter,
        *losses,
        _flops(run),
        _number(run.total("seconds"), ".1f"),
        NONE if run.memory is None else f"{run.memory / 2**30:.2f} GiB",
        _layout(run),
    )


def _loss(run: Run, key: str) -> str:
    text = _number(run.losses.get(key), ".4f")
    return f"{text} (N = {run.steps})" if key == "end" and text != NONE else text


def _number(value: float | None, form: str) -> str:
    if value is None:
        return NONE
    return format(value, form) if math.isfinite(value) else f"{value} (no number)"


def _model(run: Run) -> str:
    if run.model_config is None:
        return NONE
    model_config = run.model_config
    heads = f"{model_config.num_heads}/{model_config.num_kv_heads}"
    return f"{run.parameters / 1e6:.3g}M: {model_config.num_layers} x {model_config.hidden_size}, heads {heads}"


def _flops(run: Run) -> str:
    own = _number(run.total("flops"), ".3g")
    if own == NONE or run.spent == 0:
        return own
    return f"{own} (+ {_number(run.spent, '.3g') if run.spent is not None else '?'} before)"


def _layout(run: Run) -> str:
    if not run.layout:
        return NONE
    sizes = " x ".join(f"{name.upper()} {run.layout.get(name, '?')}" for name in ("tp", "pp", "dp"))
    precision = f", {run.precision}" if run.precision else ""
    return f"{sizes}, ZeRO {run.layout.get('zero', '?')}{precision}"


def _warning(runs: Sequence[Run]) -> str:
    longest = max((run.steps for run in runs), default=0)
    if longest < FEW_STEPS:
        return (
            f"A demonstration, not a result: the longest run here has {longest} steps. It shows that the parts work "
            "together; it does not show which way of starting a large model is better."
        )
    return "One run of each kind: a difference that is not larger than that between two seeds means nothing."


def _notes(runs: Sequence[Run], batches: Sequence[Eval], letters: dict[Eval | None, str]) -> list[str]:
    notes = []
    if len(batches) > 1:
        named = " and ".join(letters[batch] for batch in batches)
        notes.append(f"Losses under {named} were measured on different samples: do not compare one with another.")
    for batch in batches:
        of = f" of {batch.seq_length} tokens" if batch.seq_length else ""
        notes.append(f"{letters[batch]}: {batch.samples} held-out samples{of}, digest {batch.digest}.")
    if any(run.losses and not run.eval for run in runs):
        notes.append("Measured on '-': the run did not record its held-out samples; compare its losses with no other.")
    for run in runs:
        if run.hand_over:
            fitted, again = run.hand_over
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


def show(told: Told, console: Console) -> None:
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
