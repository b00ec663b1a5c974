"""Reports on runs: losses at each stage, FLOPs, time, memory, layouts and loss curves (report.html, report.png)."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
ligo report runs/fit runs/grown runs/pretrain_grown runs/pretrain_stacked --output runs/report
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, output="folder for report.html and report.png", prog=prog)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output folders of fit, grow and pretrain")
    return parser


def run(args: argparse.Namespace) -> None:
    # Imported late, to keep --help fast.
    from megatron_ligo.report import write_report

    output = Path(args.output)
    write_report([Path(run) for run in args.runs], output)
    cli.print_wrote(f"{output / 'report.html'} and {output / 'report.png'}", "open the page in a browser")
