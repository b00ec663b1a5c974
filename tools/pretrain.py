"""Pretrains a model."""

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
deepspeed --num_gpus 4 tools/pretrain.py --config run.toml --set pretrain.start=runs/grown --output runs/pretrain
python tools/pretrain.py --config run.toml --set pretrain.start=small-model --set pretrain.steps=0 --output runs/eval
"""


def main() -> None:
    parser = cli.build_parser(
        "Pretrains a model from a hand-off, from a checkpoint of any format, or from scratch (at the sizes of [small]\n"
        "and [large]). Runs under the deepspeed launcher at any tp x pp x dp, or as one plain process. An interrupted\n"
        "run resumes from its last checkpoint. pretrain.steps = 0 only evaluates.",
        EXAMPLE,
        sections=("small", "large", "pretrain", "data"),
        output="folder for checkpoints, metrics and the record pretrain.json",
    )
    args = parser.parse_args()
    config = cli.load_config(args)

    from megatron_ligo.distributed.rank_failures import (
        report_failures,  # imported late: --help must not load torch
    )
    from megatron_ligo.training.pretrain import Pretrain

    with report_failures():
        Pretrain(config, Path(args.output)).run()


if __name__ == "__main__":
    cli.run_command(main)
