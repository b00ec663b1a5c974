"""Grows a checkpoint by a fitted operator or a named initialisation, one tensor at a time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup

EXAMPLE = """
ligo grow --config run.toml --operator runs/fit/operator --output runs/grown
ligo grow --config run.toml --set operator.method=noisy_stack --output runs/unlearned
ligo grow --processes 4 --config run.toml --operator runs/fit/operator --output runs/grown
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Grows the small model into a hand-off: a DeepSpeed universal checkpoint at iteration 0 (for any tp, pp, dp\n"
        "and ZeRO stage), a Hugging Face folder, and growth.json with their origin.\n\n"
        "Without --operator, grows by the initialisation that [operator] describes. Under the deepspeed launcher the\n"
        "processes share the work, with --output on a shared file system, and write the same bytes as one process.\n"
        "An interrupted call resumes.",
        EXAMPLE,
        sections=("small", "large", "operator", "handoff"),
        output="folder for the hand-off: universal/, hf/ and growth.json",
        prog=prog,
    )
    parser.add_argument("--operator", metavar="DIR", help="operator/ folder of a fit")
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="apply an operator that was fitted on other weights or to other sizes than the config's, and record it",
    )
    launching.add_processes_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    config = cli.load_config(args)
    cli.let_waiting_threads_sleep()

    from megatron_ligo.export.handoff import grow_from_config

    with _join_ranks(config) as ranks:
        with cli.byte_progress() as update_progress:
            operator, output = args.operator and Path(args.operator), Path(args.output)
            grow_from_config(config, operator, output, update_progress, ranks, args.accept_changed_data)
        written = f"{args.output} ({', '.join(config.handoff.formats)}, growth.json)"
        start = ("--set", f"pretrain.start={args.output}", "--output", "runs/pretrain")
        cli.print_next(written, "ligo", "pretrain", *cli.config_options(args), *start)


@contextmanager
def _join_ranks(config: RunConfig) -> Iterator[RankGroup]:
    """Yields the ranks that share the work: this process alone, or all that the launcher started."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_RANK
        return
    # A single process works without Megatron-core.
    from megatron_ligo.distributed import mesh
    from megatron_ligo.distributed.rank_failures import report_failures

    with report_failures():
        mesh.init_distributed(config.handoff.timeout_minutes)
        yield mesh.all_ranks()
