"""Recommends a growth method and a learning rate from short probes, within a FLOP budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
ligo advise --config run.toml --flops 2e15 --fit --output runs/advice
ligo advise --config run.toml --flops 5e14 --method lossless --method noisy_stack --lr 3e-4 --output runs/a
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Recommends a growth method and a learning rate for your small model and your data.\n\n"
        "Grows the small model by each method that its sizes allow, trains each result for an equal share of --flops\n"
        "and ranks them by held-out loss; the loss right after growth misleads. Every method gets the same rates, the\n"
        "two best a second seed, and training from scratch is the baseline. An interrupted call resumes.",
        EXAMPLE,
        sections=("small", "large", "fit", "pretrain", "data"),
        output="folder for the probes and advice.json",
        prog=prog,
    )
    parser.add_argument(
        "--flops", type=cli.positive(float), required=True, metavar="N", help="FLOP budget of all probes together"
    )
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME", help="probe only this method; repeatable"
    )
    parser.add_argument(
        "--fit", action="store_true", help="also probe the two best after a fit ([fit]); its FLOPs count"
    )
    parser.add_argument(
        "--lr",
        type=float,
        action="append",
        default=[],
        metavar="RATE",
        help="peak learning rate; repeatable (default: 3e-4 and 1e-3)",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)

    from megatron_ligo.experiments.compare.advise import advise  # imported late: --help must not load torch

    rates = tuple(args.lr) or (3e-4, 1e-3)

    def log_line(text: str) -> None:
        print(text, flush=True)

    advice = advise(config, Path(args.output), args.flops, rates, args.method, log_line, args.fit)
    for row in [*advice["ranking"], advice["scratch"]]:
        print("  ".join("-" if value is None else f"{value}" for value in row.values()))
    for method, reason in advice["refused"].items():
        print(f"{method}: {reason}")
    print("\n".join(advice["advice"]))
