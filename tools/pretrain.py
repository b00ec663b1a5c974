"""Pretrains a model: `deepspeed --num_gpus 4 tools/pretrain.py --config run.toml --output runs/pretrain`."""

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
deepspeed --num_gpus 4 tools/pretrain.py --config run.toml --set pretrain.start=runs/grown --output runs/pretrain
python tools/pretrain.py --config run.toml --set pretrain.start=small-model --set pretrain.steps=0 --output runs/eval
"""


def main() -> None:
    parser = cli.build_parser(
        "Pretrains from a hand-off, from a checkpoint of any format, or from scratch (the sizes that [small] and\n"
        "[large] name), at any tp x pp x dp under the deepspeed launcher, or as one plain process. Started again, it\n"
        "resumes. With pretrain.steps = 0 it only evaluates.",
        EXAMPLE,
        sections=("small", "large", "pretrain", "data"),
        output="checkpoints, metrics and the record pretrain.json",
    )
    args = parser.parse_args()
    config = cli.load_config(args)

    from megatron_ligo.distributed.rank_failures import (
        report_failures,  # after the arguments: --help must not load torch
    )
    from megatron_ligo.training.pretrain import Pretrain

    with report_failures():
        Pretrain(config, Path(args.output)).run()


if __name__ == "__main__":
    cli.run_command(main)
