"""Recommends a growth method and a learning rate from short probes, within a FLOP budget."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.toml_tables import parse_value

EXAMPLE = """
ligo advise --config run.toml --minutes 30 --output runs/advice
ligo advise --config run.toml --flops 2e15 --fit --output runs/advice
ligo advise --config run.toml --minutes 60 --method corner --try fresh_scale=0.5,1,2 --output runs/advice
ligo advise --config run.toml --flops 5e14 --method lossless --method noisy_stack --lr 3e-4 --output runs/a
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Recommends a growth method and a learning rate for your small model and your data.\n\n"
        "Grows the small model by each method that its sizes allow, trains each result and ranks them by held-out\n"
        "loss; the loss right after growth misleads. Many candidates are halved: the better half goes on with probes\n"
        "of twice the length. Every method gets the same rates, the two best a second seed, and training from scratch\n"
        "is the baseline. Prints the settings to paste into the config file, with the rate that the probes ran at. An\n"
        "interrupted call resumes.",
        EXAMPLE,
        sections=("small", "large", "fit", "pretrain", "data"),
        output="folder for the probes and advice.json",
        prog=prog,
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--flops", type=cli.positive(float), metavar="N", help="FLOP budget of all probes together")
    budget.add_argument("--minutes", type=cli.positive(float), metavar="M", help="or a budget of time on this machine")
    launching.add_run_processes_option(parser, "probe")
    parser.add_argument(
        "--method", action="append", default=[], metavar="NAME", help="probe only this method; repeatable"
    )
    parser.add_argument(
        "--try",
        dest="tried",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="probe each method with these values of an [operator] key; repeatable",
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

    tried = {}
    for text in args.tried:
        key, equals, values = text.partition("=")
        if not equals or key in tried:
            raise ConfigError(Problem("--try", "KEY=A,B of [operator], each key once", text))
        tried[key] = [parse_value(value.strip()) for value in values.split(",")]

    from megatron_ligo.experiments.advise import advise  # imported late: --help must not load torch

    rates = tuple(args.lr) or (3e-4, 1e-3)

    def log_line(text: str) -> None:
        print(text, flush=True)

    launcher = launching.launcher_command(args.run_processes) if args.run_processes > 1 else ""
    budget = (args.flops or 0.0, rates, args.method)
    advice = advise(config, Path(args.output), *budget, log_line, args.fit, launcher, args.minutes, tried)
    for each in advice["rounds"]:
        dropped = ", ".join(
            f"{row['method']} at {row['lr']:g} ({_as_text(row['loss'], 'diverged')})" for row in each["dropped"]
        )
        print(f"after {each['steps']} steps, left behind: {dropped}")
    for row in [*advice["ranking"], advice["scratch"]]:
        print("  ".join(_as_text(value) for value in row.values()))
    for method, reason in advice["refused"].items():
        print(f"{method}: {reason}")
    print("\n".join(advice["advice"]))
    if advice["toml"]:
        print(f"\nTo paste into the config file, in place of these keys:\n\n{advice['toml']}")
        options = (*cli.config_options(args), "--output", "runs/grown")
        cli.print_next(f"{args.output}/advice.json", "ligo", "grow", *options)


def _as_text(value: str | float | None, missing: str = "-") -> str:
    """Formats a loss with four digits after the point, and a rate by its digits."""
    if value is None:
        return missing
    return value if isinstance(value, str) else f"{value:.4f}" if value >= 0.1 else f"{value:g}"
