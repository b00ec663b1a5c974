"""Soak tests: kills and resumes a run many times, or reads files with random or guided damage."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
ligo soak --kills 200 --output runs/soak -- ligo fit --processes 2 --config run.toml
ligo soak --kills 20 --seed 7 --output runs/soak -- ligo pretrain --config run.toml
ligo soak --kills 200 --ranks 2 --output runs/soak -- tools/fit.py --config run.toml
ligo soak --kills 200 --ranks 1 --output runs/soak -- tools/convert.py models/small {output} --to universal
ligo soak --mutations 1000 --output runs/mutated
pip install atheris; ligo soak --fuzz 30 --seed 3 --output runs/fuzzed
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    output = "folder for runs and logs, or for harmful mutations; kills in one that exists go on up to N"
    parser = cli.build_parser(__doc__, EXAMPLE, output=output, prog=prog)
    parser.add_argument(
        "--kills", type=int, metavar="N", help="kill COMMAND this often; its results must equal an undisturbed run's"
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="fork this many ranks of COMMAND, a script: they start within seconds"
    )
    parser.add_argument("--mutations", type=int, metavar="N", help="read this many randomly damaged files of all kinds")
    parser.add_argument(
        "--fuzz",
        type=float,
        metavar="MINUTES",
        help="let all readers read drawn files, guided by coverage (by chance without the package atheris); a folder "
        "that exists goes on from its corpus",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="command without --output, or with {output}")
    return parser


def run(args: argparse.Namespace) -> None:
    chosen = [name for name in ("kills", "mutations", "fuzz") if getattr(args, name) is not None]
    if len(chosen) != 1 or bool(args.command) != (chosen == ["kills"]):
        expected = "--kills with a COMMAND, or --mutations or --fuzz without one"
        raise ConfigError(Problem("soak", expected, "none, several, or the wrong one with a COMMAND"))
    if args.kills is not None:
        _run_kills(args.command, Path(args.output), args.kills, args.seed, args.ranks)
    elif args.mutations is not None:
        _run_mutations(Path(args.output), args.mutations, args.seed)
    else:
        _run_fuzz(Path(args.output), args.fuzz, args.seed)
    cli.print_wrote(args.output, "the same command with more of them, or another --seed")


def _run_kills(command: list[str], output: Path, kills: int, seed: int, ranks: int | None) -> None:
    # Imported late, to keep --help fast.
    from megatron_ligo.testing.kill_test import run_kill_test

    result = run_kill_test(command, output, kills, seed, _log_line, ranks)
    kinds = ", ".join(f"{count} x {kind}" for kind, count in result.kills.items())
    print(f"{result.count} kills survived ({kinds}): {result.rounds} runs and {result.steps} steps, bit-identical")


def _run_mutations(output: Path, count: int, seed: int) -> None:
    from megatron_ligo.testing.fuzz.trials import run_fuzz

    report = run_fuzz(output, count, seed, _log_line)
    for sample, number in sorted(report.by_sample.items()):
        print(f"{number:6} x {sample}")
    outcomes = ", ".join(f"{number} x {outcome}" for outcome, number in report.outcomes.most_common())
    print(f"{report.count} mutations tried, none harmful: {outcomes}")


def _run_fuzz(output: Path, minutes: float, seed: int) -> None:
    from megatron_ligo.testing.fuzz.guided_fuzzing import run_guided_fuzz

    tally = run_guided_fuzz(output, minutes, seed, _log_line)
    inputs, seconds = sum(entry.inputs for entry in tally.values()), sum(entry.cpu_seconds for entry in tally.values())
    print(f"{inputs} inputs of {len(tally)} targets read in {seconds / 60:.1f} minutes of CPU, none harmful")


def _log_line(text: str) -> None:
    print(text, flush=True)
