"""The report on fits, hand-offs and pretraining runs: one table, one page, one picture."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_ligo.common.atomic_files import write_bytes
from megatron_ligo.common.folder_kinds import REPORT, check_output
from megatron_ligo.common.terminal_stream import raw_stream
from megatron_ligo.report import curves, report_page, report_table
from megatron_ligo.report.run_records import read_runs

__all__ = ["write_report"]


def write_report(
    folders: Sequence[Path],
    output: Path,
    console: Console | None = None,
    prior_flops: Mapping[Path, float] | None = None,
) -> None:
    """Prints the table of the runs in `folders` and writes OUTPUT/report.html and OUTPUT/report.png.

    prior_flops: FLOPs spent before each run; None: those of the fits behind the hand-offs. Before anything is written,
    raises CheckpointError with every folder that holds no run and every damaged record.
    """
    check_output(output, REPORT)
    runs = read_runs(folders)
    if prior_flops is not None:
        runs = [replace(run, prior_flops=prior_flops[run.folder]) for run in runs]
    table = report_table.build_table(runs)
    output.mkdir(parents=True, exist_ok=True)
    write_bytes(output / "report.png", curves.draw_png(runs, table))
    write_bytes(output / "report.html", report_page.render_page(table, curves.draw_png(runs)).encode())
    report_table.print_table(table, console or Console(file=raw_stream(sys.stdout)))
