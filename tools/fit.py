"""Learns a growth operator: `deepspeed --num_gpus 4 tools/fit.py --config run.toml --output runs/fit`."""

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = "deepspeed --num_gpus 4 tools/fit.py --config run.toml --output runs/fit --set fit.steps=20"


def main() -> None:
    parser = cli.build_parser(
        "Learns the linear maps from a small model's weights to a large one's on the training loss (LiGO).\n"
        "Runs under the deepspeed launcher at any tp x pp x dp, or as one plain process. Started again, it resumes.",
        EXAMPLE,
        sections=("small", "large", "operator", "fit", "data"),
        output="checkpoints, metrics and, at the end, the folder `operator`",
    )
    args = parser.parse_args()
    config = cli.load_config(args)

    from megatron_ligo.distributed.rank_failures import (
        report_failures,  # after the arguments: --help must not load torch
    )
    from megatron_ligo.training.fit import Fit

    with report_failures():
        Fit(config, Path(args.output)).run()


if __name__ == "__main__":
    cli.run_command(main)
