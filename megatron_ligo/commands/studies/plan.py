"""Predicts memory, FLOPs, time and traffic of a run from its config."""

from __future__ import annotations

import argparse

from megatron_ligo import cli

EXAMPLE = """
ligo plan --config run.toml --processes 8 --device-memory 80 --tflops 300
ligo plan --table
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(
        "Predicts memory, FLOPs, time and traffic of a fit, a growth and a pretraining from the model sizes alone.\n"
        "The small model may be a config.json without weights. --table shows growth from 1B to 10B and from 10B to\n"
        "100B parameters on 64 to 1024 devices.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "handoff", "pretrain", "data"),
        prog=prog,
    )
    parser.add_argument(
        "--processes",
        "--world",
        dest="world",
        type=cli.positive(int),
        default=1,
        metavar="N",
        help="processes of the run, one per device (default: 1)",
    )
    parser.add_argument(
        "--device-memory",
        type=cli.positive(float),
        default=80.0,
        metavar="GB",
        help="memory of one device, 10^9 bytes (default: 80)",
    )
    parser.add_argument(
        "--tflops",
        type=cli.positive(float),
        default=300.0,
        help="sustained TFLOP/s of one device in the run's precision (default: 300)",
    )
    parser.add_argument("--layouts", action="store_true", help="also list the layouts that do not work, with reasons")
    parser.add_argument("--table", action="store_true", help="print the scaling table instead")
    return parser


def run(args: argparse.Namespace) -> None:

    from megatron_ligo.planning import run_plan, scaling_table  # imported late: --help must not load torch

    flops_per_second, device_bytes = args.tflops * 1e12, args.device_memory * 1e9
    if args.table:
        print("\n".join(scaling_table.format_scaling_table(flops_per_second, device_bytes)))
        return
    plan = run_plan.plan_run(cli.load_config(args), args.world, device_bytes, flops_per_second)
    print(plan)
    if args.layouts:
        print(f"\n{plan.describe_refused_layouts()}")
    if not plan.is_valid:
        cli.print_wrote("", "another --processes, or other layouts; --layouts lists those that do not work")
        return
    processes = ("--processes", args.world) if args.world > 1 else ()
    cli.print_next("", "ligo", "fit", *processes, *cli.config_options(args), "--output", "runs/fit")
