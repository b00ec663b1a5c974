"""Staged growth: trains a chain of models, each grown from the one before, as one file describes.

    [shared.data] ...                               config sections that all stages share
    [[stages]]                                      one stage (one model); the order matters
    name = "small"                                  the stage's folder in --output
    launcher = ["deepspeed", "--num_gpus", "4"]     starts the stage's processes, with --module; unset: one
    [stages.large] ...                              the stage's own sections, which override the shared ones

The first stage trains a model from scratch at the sizes of [small] and [large], or from pretrain.start. Each further
stage grows the previous stage's model, after a fit if its [fit] sets steps, and trains it. An interrupted call resumes
at the same step. chain.json records the lineage; report/ shows losses against the FLOPs of all stages so far.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
ligo stages chain.toml --output runs/chain
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, output="folder for the stages, chain.json and report/", prog=prog)
    parser.add_argument("chain", metavar="CHAIN.toml", help="the stages and their shared sections")
    parser.add_argument(
        "--accept-changed-data", action="store_true", help="go on although data or models have changed since; recorded"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    # Imported late, to keep --help fast.
    from megatron_ligo.experiments import staged_growth

    output = Path(args.output)
    stages = staged_growth.load_stages(Path(args.chain), output)
    staged_growth.run_stages(stages, output, lambda text: print(f"== {text}", flush=True), args.accept_changed_data)
    cli.print_next(f"{output / staged_growth.RECORD} and {output / 'report'}", "ligo", "verify", output)
