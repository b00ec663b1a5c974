"""Compares ways of starting a large model at equal FLOPs: `tools/compare.py --config c.toml --output runs/c`."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.experiments.compare.comparison_config import CompareSection

EXAMPLE = """
python tools/compare.py --config tools/benchmarks/growth/brown.toml --output runs/brown
python tools/compare.py --config compare.toml --only scratch --only learned --output runs/compare
"""


def main() -> None:
    made = cli.build_parser(
        "Trains a large model from scratch and from each [arms.NAME], every arm at the same FLOPs, rates and seeds;\n"
        "a learned arm beside its start without a fit and beside full training on the fit's batches. An arm has\n"
        "operator = {...} and, where it is learned, fit = {...}; lag = STEPS fits on the loss after so many. Writes\n"
        "results.json, compare.html and compare.png. Started again it goes on; several may work on one folder.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "handoff", "pretrain", "data"),
        output="folder of all runs and of the results",
        extra_sections={"compare": CompareSection},
    )
    made.add_argument("--only", action="append", default=[], metavar="ARM", help="run this arm only; repeatable")
    args = made.parse_args()
    if not args.config:
        raise ConfigError(Problem("--config", "a comparison's file", "none", "It names the [arms.*]; see the example."))

    from megatron_ligo.experiments.compare import (  # after the arguments: --help must not load torch
        comparison,
        comparison_config,
        comparison_page,
    )

    spec = comparison_config.load_comparison(Path(args.config), args.set)
    found = comparison.run_comparison(spec, Path(args.output), args.only, lambda name: print(name, flush=True))
    print(comparison_page.describe_comparison(found))
    for row in (*comparison_page.arm_rows(found), *comparison_page.difference_rows(found)):
        print("  ".join(row))
    for line in found["cautions"]:
        print(f"- {line}")


if __name__ == "__main__":
    cli.run_command(main)
