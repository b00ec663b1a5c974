"""Starts several processes of a command on this machine, by DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_ligo import cli


def add_processes_option(parser: cli.CommandParser) -> None:
    """Adds --processes N."""
    parser.add_argument(
        "--processes",
        type=cli.positive(int),
        default=1,
        metavar="N",
        help="start N processes on this machine, one per GPU (default: 1; under a launcher: those that it has started)",
    )


def is_launcher_wanted(args: argparse.Namespace) -> bool:
    """True if --processes asks for more than this process and no launcher has started it."""
    return vars(args).get("processes", 1) > 1 and "WORLD_SIZE" not in os.environ


def launch(name: str, args: argparse.Namespace, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by DeepSpeed's launcher of `args.processes` processes of the subcommand `name`."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    words = [*shlex.split(launcher_command(args.processes)), "megatron_ligo", name, *arguments]
    os.execv(sys.executable, words)


def launcher_command(processes: int) -> str:
    """Returns the command, as text, that starts a module on `processes` processes of this machine."""
    words = ["deepspeed.launcher.runner", "--num_gpus", f"{processes}", "--master_port", f"{_free_port()}", "--module"]
    return shlex.join([sys.executable, "-m", *words])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
