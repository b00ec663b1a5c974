"""Makes token codes from the training data: the embedding's new features for method = "corner", or for scratch."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
ligo codes --config run.toml --output runs/codes
ligo grow --config run.toml --set operator.method=corner --set operator.codes=runs/codes --output runs/grown
ligo codes --config run.toml --scratch --output runs/scratch_codes
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Counts which tokens follow which in data.train, and makes codes of each token from the counts: the new\n"
        "features of the embedding for operator.method = 'corner' (operator.codes), or the whole embedding of a start\n"
        "from scratch (pretrain.codes). It needs no model's FLOPs; codes.json records its own.",
        EXAMPLE,
        sections=("small", "large", "operator", "data"),
        output="folder for codes.safetensors and codes.json",
        prog=prog,
    )
    parser.add_argument("--scratch", action="store_true", help="codes for a start from scratch, of all features")
    parser.add_argument(
        "--tokens",
        type=int,
        default=50_000_000,
        metavar="N",
        help="most tokens to count, spread evenly over the data; 0: all (default: 50000000)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)

    from megatron_ligo.checkpoint import formats  # imported late: --help must not load torch
    from megatron_ligo.data.token_codes import build_codes
    from megatron_ligo.training.initial_weights import scratch_model_config

    large = scratch_model_config(config)
    source = None if args.scratch else formats.open_small(config.small)
    record = build_codes(config, large, Path(args.output), source, args.tokens)
    print(
        f"{record['codes']} codes of {record['vocab_size']} tokens from {record['tokens']} tokens: "
        f"{record['seconds']} s, {record['flops']:.2g} FLOPs"
    )
    options = cli.config_options(args)
    if args.scratch:
        start = ("--set=pretrain.start=scratch", f"--set=pretrain.codes={args.output}", "--output", "runs/scratch")
        cli.print_next(args.output, "ligo", "pretrain", *options, *start)
    else:
        keys = ("--set=operator.method=corner", f"--set=operator.codes={args.output}", "--output", "runs/grown")
        cli.print_next(args.output, "ligo", "grow", *options, *keys)
