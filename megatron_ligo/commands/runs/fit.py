"""Fits a growth operator."""

from __future__ import annotations

import argparse

from megatron_ligo import cli
from megatron_ligo.commands.runs import training_options

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
    training_options.add_training_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)

    from megatron_ligo.training.fit import Fit  # imported late: --help must not load torch

    training_options.run_training(Fit, config, args)
    operator = f"{args.output}/operator"
    options = (*cli.config_options(args), "--operator", operator, "--output", "runs/grown")
    cli.print_next(operator, "ligo", "grow", *options)
