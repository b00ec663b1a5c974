"""Compares starts of a large model at equal FLOPs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.experiments.compare.comparison_config import CompareSection

EXAMPLE = """
ligo compare --config tools/benchmarks/growth/brown.toml --output runs/brown
ligo compare --config compare.toml --only scratch --only learned --output runs/compare
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Compares starts of a large model at equal FLOPs.\n\n"
        "Trains the model from scratch and from each [arms.NAME] of the config file, with the same FLOPs, learning\n"
        "rates and seeds. An arm has operator = {...} and, if it is fitted, fit = {...}; lag = STEPS minimises the\n"
        "loss after that many training steps. A fitted arm is also compared to its start without a fit, and to\n"
        "training all weights on the fit's batches. small = true trains the small model on; source_steps = STEPS\n"
        "grows it at another time. compare.fit_lrs tunes the fits too, compare.source_seeds grows several small\n"
        "models, compare.source_valid also measures each end on the small model's own text. With pretrain.schedule\n"
        "= 'wsd' a seed's budgets branch off one trunk, at about the price of the largest. Writes results.json,\n"
        "compare.html and compare.png. An interrupted call resumes, and several calls may share one output folder.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "handoff", "pretrain", "data"),
        output="folder for all runs and the results",
        extra_sections={"compare": CompareSection},
        prog=prog,
    )
    launching.add_run_processes_option(parser, "training")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="run only this arm; repeatable")
    parser.add_argument(
        "--accept-changed-data", action="store_true", help="go on although data or models have changed since; recorded"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    if not args.config:
        raise ConfigError(Problem("--config", "a config file with [arms.NAME] sections", "none", "See the example."))

    from megatron_ligo.experiments.compare import (  # imported late: --help must not load torch
        comparison,
        comparison_config,
        comparison_page,
    )

    config = comparison_config.load_comparison(Path(args.config), args.set)
    if args.run_processes > 1:
        if config.compare.launcher:
            hint = "Leave one of them out."
            raise ConfigError(Problem("--processes", "no compare.launcher beside it", config.compare.launcher, hint))
        launcher = launching.launcher_command(args.run_processes)
        config = replace(config, compare=replace(config.compare, launcher=launcher))
    results = comparison.run_comparison(
        config, Path(args.output), args.only, lambda text: print(text, flush=True), args.accept_changed_data
    )
    print(comparison_page.describe_comparison(results))
    for row in (*comparison_page.arm_rows(results), *comparison_page.difference_rows(results)):
        print("  ".join(row))
    for line in results["cautions"]:
        print(f"- {line}")
    cli.print_wrote(f"{args.output}/results.json, compare.html and compare.png", "open the page in a browser")
