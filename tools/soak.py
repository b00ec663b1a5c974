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
    made = cli.build_parser(__doc__, EXAMPLE, output="new folder for runs and logs, or for what did harm")
    made.add_argument("--kills", type=int, metavar="N", help="so many of COMMAND, which must end as if left alone")
    made.add_argument(
        "--ranks", type=int, metavar="N", help="of COMMAND, a script, forked from one process: they start in seconds"
    )
    made.add_argument("--mutations", type=int, metavar="N", help="so many changes of files of all kinds")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    made.add_argument("command", nargs="*", metavar="COMMAND", help="of a fit or a pretraining, without --output")
    args = made.parse_args()
    if (args.kills is None) == (args.mutations is None) or bool(args.command) != (args.kills is not None):
        raise ConfigError("soak: expected --kills with a COMMAND, or --mutations without one.")
    if args.kills is not None:
        _kill(args.command, Path(args.output), args.kills, args.seed, args.ranks)
    else:
        _mutate(Path(args.output), args.mutations, args.seed)


def _kill(command: list[str], output: Path, kills: int, seed: int, ranks: int | None) -> None:
    # Imported here: --help need not wait for it.
    from megatron_ligo.testing.kill_test import run_kill_test

    done = run_kill_test(command, output, kills, seed, _tell, ranks)
    means = ", ".join(f"{count} x {how}" for how, count in done.kills.items())
    print(f"{sum(done.kills.values())} kills survived ({means}): {done.rounds} runs, {done.steps} steps, bit for bit")


def _mutate(output: Path, count: int, seed: int) -> None:
    from megatron_ligo.testing.fuzz.trials import mutate

    tally = mutate(output, count, seed, _tell)
    for name, each in sorted(tally.by_sample.items()):
        print(f"{each:6} x {name}")
    ends = ", ".join(f"{each} x {how}" for how, each in tally.outcomes.most_common())
    print(f"{tally.tried} changes tried, none did harm: {ends}")


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    cli.run_command(main)
