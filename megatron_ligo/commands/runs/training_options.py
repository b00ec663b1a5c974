"""The options that a fit and a pretraining share, and how either of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.common import terminal_stream
from megatron_ligo.config.run_config import RunConfig

if TYPE_CHECKING:
    from megatron_ligo.training.fit import Fit
    from megatron_ligo.training.pretrain import Pretrain


def add_training_options(parser: cli.CommandParser) -> None:
    """Adds what to do after an anomaly and after changed inputs, and --processes."""
    parser.add_argument(
        "--resume-after-anomaly", action="store_true", help="resume a run that has stopped at an anomaly, and pass it"
    )
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="go on although data, models or tokenizer have changed since the run began; the run records it",
    )
    parser.add_argument(
        "--full-check",
        action="store_true",
        help="read every data file and model again to compare it, whatever is known about it, and none by samples",
    )
    launching.add_processes_option(parser)


def run_training(job: type[Fit | Pretrain], config: RunConfig, args: argparse.Namespace) -> None:
    """Runs a fit or a pretraining in --output."""
    # Imported late: --help must not load torch.
    from megatron_ligo.distributed.rank_failures import report_failures
    from megatron_ligo.export.run_inputs import InputPolicy

    policy = InputPolicy(args.accept_changed_data, args.full_check)
    with report_failures(), terminal_stream.outlive_readers():
        job(config, Path(args.output), resume_after_anomaly=args.resume_after_anomaly, policy=policy).run()
