"""Starts several processes of a command on this machine, by DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import random
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem

PORTS = (20_000, 32_000)
# By name: a module that is imported already is not a clean one to start.
LAUNCHER = "megatron_ligo.commands.deepspeed_launcher"


def add_processes_option(parser: cli.CommandParser) -> None:
    """Adds --processes N."""
    parser.add_argument(
        "--processes",
        type=cli.positive(int),
        default=1,
        metavar="N",
        help="start N processes on this machine, one per GPU (default: 1; under a launcher: those that it has started)",
    )


def add_run_processes_option(parser: cli.CommandParser, runs: str) -> None:
    """Adds --processes N of a command that stays one process and starts runs, of N processes each."""
    parser.add_argument(
        "--processes",
        dest="run_processes",
        type=cli.positive(int),
        default=1,
        metavar="N",
        help=f"run each {runs} on N processes, at the layout of the config (default: 1, at tp = pp = 1)",
    )


def is_launcher_wanted(args: argparse.Namespace) -> bool:
    """True if --processes asks for more than this process and no launcher has started it."""
    return vars(args).get("processes", 1) > 1 and "WORLD_SIZE" not in os.environ


def check_processes(args: argparse.Namespace) -> None:
    """Raises ConfigError if a launcher has started another number of processes than --processes asks for."""
    asked, started = vars(args).get("processes", 1), os.environ.get("WORLD_SIZE", "")
    if asked > 1 and started and started != f"{asked}":
        hint = "Leave it out under a launcher, or clear WORLD_SIZE, RANK and LOCAL_RANK."
        raise ConfigError(Problem(f"--processes {asked}", "as many as WORLD_SIZE in the environment", started, hint))


def launch(name: str, args: argparse.Namespace, arguments: Sequence[str]) -> NoReturn:
    """Replaces this process by DeepSpeed's launcher of `args.processes` processes of the subcommand `name`."""
    for package in ("deepspeed", "megatron"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.processes)))
    words = [*shlex.split(launcher_command(args.processes)), "megatron_ligo", name, *arguments]
    os.execv(sys.executable, words)


def launcher_command(processes: int) -> str:
    """Returns the command, as text, that starts a module on `processes` processes of this machine."""
    return shlex.join([sys.executable, "-m", LAUNCHER, f"{processes}", f"{_free_port()}"])


def _free_port() -> int:
    """Returns a port that is free now, below those that the system hands out while the launcher starts."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
