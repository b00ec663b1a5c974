"""The subcommands of `ligo`, and how one of them runs.

A subcommand is one entry of SUBCOMMANDS and one module:
    build_parser(prog: str | None = None) -> cli.CommandParser
    run(args: argparse.Namespace) -> None
Neither imports torch before `run` has checked what it can check without.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple, NoReturn

import megatron_ligo
from megatron_ligo import cli
from megatron_ligo.commands import launching
from megatron_ligo.common.errors import did_you_mean
from megatron_ligo.distributed.hostfile import check_world_size

__all__ = ["SUBCOMMANDS", "Subcommand", "load", "main", "script_main"]


class Subcommand(NamedTuple):
    """module: below this package."""

    module: str
    summary: str


SUBCOMMANDS = {
    "inspect": Subcommand("models.inspect", "what a checkpoint is: format, sizes, every tensor"),
    "convert": Subcommand("models.convert", "converts a checkpoint to another format"),
    "verify": Subcommand("models.verify", "compares two checkpoints, or a run with what it recorded"),
    "prepare": Subcommand("data.prepare", "text to a tokenizer and training data"),
    "prepare-images": Subcommand("data.prepare_images", "labelled images to training data"),
    "codes": Subcommand("data.codes", "token codes from training data, for corner and scratch starts"),
    "init": Subcommand("studies.init", "writes a run.toml with sizes that fit, and shows its plan"),
    "plan": Subcommand("studies.plan", "predicts memory, FLOPs, time and traffic of a run"),
    "advise": Subcommand("studies.advise", "recommends a growth method and a learning rate from short probes"),
    "fit": Subcommand("runs.fit", "learns a growth operator"),
    "grow": Subcommand("models.grow", "grows a model by an operator, learned or named"),
    "pretrain": Subcommand("runs.pretrain", "trains or evaluates a model"),
    "eval": Subcommand("studies.eval", "evaluates models side by side with lm-evaluation-harness"),
    "report": Subcommand("runs.report", "a page of curves and a table of runs"),
    "compare": Subcommand("studies.compare", "compares starts of a large model at equal FLOPs"),
    "stages": Subcommand("runs.stages", "a chain of trainings, fits and growths from one file"),
    "hosts": Subcommand("runs.hosts", "checks the hostfile of a run over several nodes"),
    "bench": Subcommand("studies.bench", "measures speed and memory on this machine"),
    "soak": Subcommand("studies.soak", "kills and resumes a run many times, or reads damaged files"),
    "schema": Subcommand("schema", "prints the JSON schema of run.toml, for editors"),
    "completion": Subcommand("completion", "prints a completion script for bash, zsh or fish"),
}


def main() -> NoReturn:
    """Runs `ligo`, the command of the package."""
    cli.run_command(_run_subcommand)


def load(name: str) -> ModuleType:
    """Imports the module of a subcommand."""
    return importlib.import_module(f"{__name__}.{SUBCOMMANDS[name].module}")


def script_main(name: str) -> Callable[[], None]:
    """Returns the main function of a script that is one subcommand, for `deepspeed tools/fit.py`."""
    return partial(_run_module, name, None, None)


def _run_module(name: str, prog: str | None, arguments: Sequence[str] | None) -> None:
    module = load(name)
    args = module.build_parser(prog).parse_args(arguments)
    check_world_size()
    launching.check_processes(args)
    if launching.is_launcher_wanted(args):
        cli.load_config(args)
        launching.launch(name, args, sys.argv[1:] if arguments is None else arguments)
    module.run(args)


def _run_subcommand() -> None:
    parser = _build_parser()
    args = parser.parse_args()
    if args.command is None:
        parser.print_help()
        sys.exit(2)
    if args.command not in SUBCOMMANDS:
        parser.error(f"no command {args.command!r}. {did_you_mean(args.command, SUBCOMMANDS)}")
    _run_module(args.command, f"ligo {args.command}", args.arguments)


def _build_parser() -> cli.CommandParser:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in SUBCOMMANDS.items()]
    parser = cli.CommandParser(
        prog="ligo",
        usage="ligo COMMAND ...",
        description=megatron_ligo.__doc__.partition("\n\n")[0],
        epilog="\n".join(["commands (ligo COMMAND --help):", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megatron_ligo {megatron_ligo.__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    # DeepSpeed's launcher puts it before the command.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser
