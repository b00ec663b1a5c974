"""Which method, which rate: short probes on your own small model and text, within a budget of FLOPs."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
python tools/advise.py --config run.toml --flops 2e15 --fit --output runs/advice
python tools/advise.py --config run.toml --flops 5e14 --method lossless --method noisy_stack --lr 3e-4 --output runs/a
"""


def main() -> None:
    made = cli.build_parser(
        "Grows the small model by each method that its sizes allow, trains each for as many steps as --flops leaves\n"
        "to it, and ranks them by the held-out loss after that lag (at step 0 it misleads). The same rates for each,\n"
        "the two best with another seed, scratch beside them. Started again, it goes on where it stopped.",
        EXAMPLE,
        sections=("small", "large", "fit", "pretrain", "data"),
        output="folder for the probes and advice.json",
    )
    made.add_argument("--flops", type=float, required=True, metavar="N", help="of all probes together")
    made.add_argument("--method", action="append", default=[], metavar="NAME", help="probe this one only; repeatable")
    made.add_argument("--fit", action="store_true", help="probe the two best after [fit] as well, its FLOPs counted")
    made.add_argument("--lr", type=float, action="append", default=[], metavar="RATE", help="default: 3e-4 and 1e-3")
    args = made.parse_args()
    config = cli.load_config(args)

    from megatron_ligo.experiments.compare.advise import advise  # after the arguments: --help must not load torch

    rates = tuple(args.lr) or (3e-4, 1e-3)

    def log_line(name: str) -> None:
        print(name, flush=True)

    found = advise(config, Path(args.output), args.flops, rates, args.method, log_line, args.fit)
    for row in [*found["ranking"], found["scratch"]]:
        print("  ".join("-" if value is None else f"{value}" for value in row.values()))
    for name, why in found["refused"].items():
        print(f"{name}: {why}")
    print("\n".join(found["advice"]))


if __name__ == "__main__":
    cli.run_command(main)
