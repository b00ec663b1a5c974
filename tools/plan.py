"""What a run will take, before any machine is rented: `python tools/plan.py --config run.toml --world 8`."""

from dataclasses import replace
from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
python tools/plan.py --config run.toml --world 8 --device-memory 80 --tflops 300
python tools/plan.py --table
"""


def main() -> None:
    parser = cli.build_parser(
        "Memory, FLOPs, time and traffic of a fit, a growth and a pretraining, from the sizes alone. The small model\n"
        "may be a config.json without weights. With --table, 1B to 10B and 10B to 100B on 64 to 1024 devices.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "handoff", "pretrain", "data"),
    )
    parser.add_argument("--world", type=int, default=1, metavar="N", help="processes (devices)")
    parser.add_argument("--device-memory", type=float, default=80.0, metavar="GB", help="of one device")
    parser.add_argument("--tflops", type=float, default=300.0, help="that a device sustains in the run's precision")
    parser.add_argument("--layouts", action="store_true", help="also say which layouts are refused, and why")
    parser.add_argument("--table", action="store_true", help="the table of large growths on many devices")
    args = parser.parse_args()

    from megatron_ligo.plan import plan_text, scaling_table  # after the arguments: --help must not load torch

    rate, room = args.tflops * 1e12, args.device_memory * 1e9
    if args.table:
        print("\n".join(scaling_table.format_scaling_table(rate, room)))
        return
    config = cli.load_config(args)
    fit, pretrain = jobs(config, args.world)
    pages = [plan_text.describe_models(fit.operator), plan_text.describe_run("fit", fit, rate, room)]
    pages.append(plan_text.describe_growth(fit.operator, config.handoff.formats, config.handoff.dtype))
    pages.append(plan_text.describe_run("pretraining", pretrain, rate, room))
    pages.append(plan_text.describe_checkpoints(fit.operator, config.pretrain.precision))
    if args.layouts:
        pages += [
            plan_text.describe_refused_layouts("fit", fit),
            plan_text.describe_refused_layouts("pretraining", pretrain),
        ]
    print("\n\n".join("\n".join(page) for page in pages))


def jobs(config, world: int):
    """The fit and the pretraining that a config describes."""
    from megatron_ligo.growth.validation import build_initial_operator
    from megatron_ligo.plan.planned_job import PlannedJob
    from megatron_ligo.training.initial_weights import read_model_config

    operator = build_initial_operator(read_model_config(Path(config.small.path)), config.large, config.operator)
    seq = operator.large.tokens_of_sample(config.data.seq_length)
    more = {"distilled": config.fit.distill > 0, "lagged": bool(config.fit.lag)}
    fit = PlannedJob(operator.large, config.fit, world, seq, operator, config.fit.source == "whole", **more)
    return fit, replace(fit, training=config.pretrain, operator=None, **dict.fromkeys(more, False))


if __name__ == "__main__":
    cli.run_command(main)
