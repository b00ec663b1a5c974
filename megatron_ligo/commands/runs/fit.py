"""Fits a growth operator."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.common import terminal_stream

EXAMPLE = "ligo fit --processes 4 --config run.toml --output runs/fit --set fit.steps=20"


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Fits a growth operator: learns the linear maps from a small model's weights to a large one's by minimising\n"
        "the large model's training loss (LiGO, arXiv 2303.00980). Runs under the deepspeed launcher at any tp x pp x\n"
        "dp, or as one plain process. An interrupted run resumes from its last checkpoint.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "data"),
        output="folder for checkpoints, metrics and, at the end, operator/",
        prog=prog,
    )
    parser.add_argument(
        "--resume-after-anomaly", action="store_true", help="resume a run that has stopped at an anomaly, and pass it"
    )
    cli.add_input_options(parser)
    launching.add_processes_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)

    from megatron_ligo.distributed.rank_failures import (
        report_failures,  # imported late: --help must not load torch
    )
    from megatron_ligo.export.run_inputs import InputPolicy
    from megatron_ligo.training.fit import Fit

    policy = InputPolicy(args.accept_changed_data, args.full_check)
    with report_failures(), terminal_stream.outlive_readers():
        Fit(config, Path(args.output), resume_after_anomaly=args.resume_after_anomaly, policy=policy).run()
    operator = f"{args.output}/operator"
    options = (*cli.config_options(args), "--operator", operator, "--output", "runs/grown")
    cli.print_next(operator, "ligo", "grow", *options)
