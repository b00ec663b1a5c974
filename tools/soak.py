"""Kills a run again and again, at random moments, and compares what it leaves with that of a run left alone."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
python tools/soak.py --kills 200 --output runs/soak -- deepspeed --num_gpus 2 tools/fit.py --config run.toml
python tools/soak.py --kills 20 --seed 7 --output runs/soak -- python tools/pretrain.py --config run.toml
"""


def main() -> None:
    made = cli.parser(__doc__, EXAMPLE, output="new folder for the runs and their logs")
    made.add_argument("--kills", type=int, default=20, metavar="N", help="so many in all (default 20)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and the means (default 0)")
    made.add_argument("command", nargs="+", metavar="COMMAND", help="of a fit or a pretraining, without --output")
    args = made.parse_args()
    # Imported here: --help need not wait for it.
    from megatron_ligo.soak import soak

    done = soak(args.command, Path(args.output), args.kills, args.seed, lambda text: print(text, flush=True))
    means = ", ".join(f"{count} x {how}" for how, count in done.kills.items())
    print(f"{sum(done.kills.values())} kills survived ({means}): {done.rounds} runs, {done.steps} steps, bit for bit")


if __name__ == "__main__":
    cli.run(main)
