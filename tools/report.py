"""Reports on runs: losses at each stage, FLOPs, time, memory, layouts and loss curves (report.html, report.png)."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
python tools/report.py runs/fit runs/grown runs/pretrain_grown runs/pretrain_stacked --output runs/report
"""


def main() -> None:
    parser = cli.build_parser(__doc__, EXAMPLE, output="folder for report.html and report.png")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="--output folders of fit, grow and pretrain")
    args = parser.parse_args()
    # Imported late, to keep --help fast.
    from megatron_ligo.report import write_report

    output = Path(args.output)
    write_report([Path(run) for run in args.runs], output)
    print(f"{output / 'report.html'} and {output / 'report.png'} written")


if __name__ == "__main__":
    cli.run_command(main)
