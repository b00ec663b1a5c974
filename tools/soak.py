"""A long trial: a run that is killed again and again, or files that are changed at random and read."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError

EXAMPLE = """
python tools/soak.py --kills 200 --output runs/soak -- deepspeed --num_gpus 2 tools/fit.py --config run.toml
python tools/soak.py --kills 20 --seed 7 --output runs/soak -- python tools/pretrain.py --config run.toml
python tools/soak.py --kills 200 --ranks 2 --output runs/soak -- tools/fit.py --config run.toml
python tools/soak.py --mutations 1000 --output runs/mutated
"""


def main() -> None:
    parser = cli.build_parser(__doc__, EXAMPLE, output="new folder for runs and logs, or for what did harm")
    parser.add_argument("--kills", type=int, metavar="N", help="so many of COMMAND, which must end as if left alone")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="of COMMAND, a script, forked from one process: they start in seconds"
    )
    parser.add_argument("--mutations", type=int, metavar="N", help="so many changes of files of all kinds")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    parser.add_argument("command", nargs="*", metavar="COMMAND", help="of a fit or a pretraining, without --output")
    args = parser.parse_args()
    if (args.kills is None) == (args.mutations is None) or bool(args.command) != (args.kills is not None):
        raise ConfigError("soak: expected --kills with a COMMAND, or --mutations without one.")
    if args.kills is not None:
        _kill(args.command, Path(args.output), args.kills, args.seed, args.ranks)
    else:
        _mutate(Path(args.output), args.mutations, args.seed)


def _kill(command: list[str], output: Path, kills: int, seed: int, ranks: int | None) -> None:
    # Imported here to keep --help fast.
    from megatron_ligo.testing.kill_test import run_kill_test

    result = run_kill_test(command, output, kills, seed, _log_line, ranks)
    kills_by_mode = ", ".join(f"{count} x {how}" for how, count in result.kills.items())
    kills = sum(result.kills.values())
    print(f"{kills} kills survived ({kills_by_mode}): {result.rounds} runs, {result.steps} steps, bit for bit")


def _mutate(output: Path, count: int, seed: int) -> None:
    from megatron_ligo.testing.fuzz.trials import run_fuzz

    report = run_fuzz(output, count, seed, _log_line)
    for name, each in sorted(report.by_sample.items()):
        print(f"{each:6} x {name}")
    ends = ", ".join(f"{each} x {how}" for how, each in report.outcomes.most_common())
    print(f"{report.count} mutations tried, none did harm: {ends}")


def _log_line(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_command(main)
