"""Pretrains a model."""

from __future__ import annotations

import argparse

from megatron_ligo import cli
from megatron_ligo.commands.runs import training_options

EXAMPLE = """
ligo pretrain --processes 4 --config run.toml --set pretrain.start=runs/grown --output runs/pretrain
ligo pretrain --config run.toml --set pretrain.start=models/small --set pretrain.steps=0 --output runs/eval
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Pretrains a model from a hand-off, a checkpoint of any format, or scratch (pretrain.start=scratch: fresh\n"
        "weights at the sizes of [small] and [large]). Runs under the deepspeed launcher at any tp x pp x dp, or as\n"
        "one plain process. An interrupted run resumes from its last checkpoint. pretrain.steps = 0 only evaluates;\n"
        "more steps than a run was started with extend it.",
        EXAMPLE,
        sections=("small", "large", "pretrain", "data"),
        output="folder for checkpoints, metrics and the record pretrain.json",
        prog=prog,
    )
    training_options.add_training_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)

    from megatron_ligo.training.pretrain import Pretrain  # imported late: --help must not load torch

    training_options.run_training(Pretrain, config, args)
    cli.print_next(args.output, "ligo", "report", args.output, "--output", "runs/report")
