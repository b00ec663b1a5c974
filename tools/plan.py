"""Predicts memory, FLOPs, time and traffic of a run from its config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ligo import cli
from megatron_ligo.config.run_config import RunConfig

if TYPE_CHECKING:
    from megatron_ligo.plan.planned_job import PlannedJob

EXAMPLE = """
python tools/plan.py --config run.toml --world 8 --device-memory 80 --tflops 300
python tools/plan.py --table
"""


def main() -> None:
    parser = cli.build_parser(
        "Predicts memory, FLOPs, time and traffic of a fit, a growth and a pretraining from the model sizes alone.\n"
        "The small model may be a config.json without weights. --table shows growth from 1B to 10B and from 10B to\n"
        "100B parameters on 64 to 1024 devices.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "handoff", "pretrain", "data"),
    )
    parser.add_argument(
        "--world", type=cli.positive(int), default=1, metavar="N", help="number of devices (default: 1)"
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
    args = parser.parse_args()

    from megatron_ligo.plan import plan_text, scaling_table  # imported late: --help must not load torch

    flops_per_second, device_bytes = args.tflops * 1e12, args.device_memory * 1e9
    if args.table:
        print("\n".join(scaling_table.format_scaling_table(flops_per_second, device_bytes)))
        return
    config = cli.load_config(args)
    fit, pretrain = plan_jobs(config, args.world)
    pages = [
        plan_text.describe_models(fit.operator),
        plan_text.describe_run("fit", fit, flops_per_second, device_bytes),
    ]
    pages.append(plan_text.describe_growth(fit.operator, config.handoff.formats, config.handoff.dtype))
    pages.append(plan_text.describe_run("pretraining", pretrain, flops_per_second, device_bytes))
    pages.append(plan_text.describe_checkpoints(fit.operator, config.pretrain.precision))
    if args.layouts:
        pages += [
            plan_text.describe_refused_layouts("fit", fit),
            plan_text.describe_refused_layouts("pretraining", pretrain),
        ]
    print("\n\n".join("\n".join(page) for page in pages))


def plan_jobs(config: RunConfig, world_size: int) -> tuple[PlannedJob, PlannedJob]:
    """Returns the fit and the pretraining that a config describes."""
    from megatron_ligo.growth.validation import build_initial_operator
    from megatron_ligo.plan.planned_job import PlannedJob
    from megatron_ligo.training.initial_weights import read_model_config

    operator = build_initial_operator(read_model_config(Path(config.small.path)), config.large, config.operator)
    seq_length = operator.large.tokens_per_sample(config.data.seq_length)
    fit_only = {"distilled": config.fit.distill > 0, "lagged": bool(config.fit.lag)}
    fit = PlannedJob(
        operator.large, config.fit, world_size, seq_length, operator, config.fit.source == "whole", **fit_only
    )
    return fit, replace(fit, training=config.pretrain, operator=None, **dict.fromkeys(fit_only, False))


if __name__ == "__main__":
    cli.run_command(main)
