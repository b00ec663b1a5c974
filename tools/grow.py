"""Applies an operator, learned or a named initialisation, to a checkpoint: tensor by tensor, never holding it whole."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ligo import cli, formats
from megatron_ligo.errors import ConfigError, message
from megatron_ligo.grow import Grown
from megatron_ligo.growth.check import initial_operator
from megatron_ligo.growth.file import Saved
from megatron_ligo.growth.methods import describe
from megatron_ligo.handoff import growth_record, hand_off

EXAMPLE = """
python tools/grow.py --config run.toml --operator runs/fit/operator --output runs/grown
python tools/grow.py --config run.toml --set operator.method=noisy_stack --output runs/unlearned
"""


def main() -> None:
    parser = cli.parser(
        "Grows the small model into a hand-off: DeepSpeed's universal checkpoint at iteration 0 (any tp, pp, dp and\n"
        "ZeRO stage), the Hugging Face folder, and growth.json. Without --operator, by the initialisation that\n"
        "[operator] names. Interrupted and started again, it goes on where it stopped.",
        EXAMPLE,
        sections=("small", "large", "operator", "handoff"),
        output="the hand-off: universal/, hf/, growth.json",
    )
    parser.add_argument("--operator", metavar="DIR", help="the folder `operator` that a fit wrote")
    args = parser.parse_args()
    config = cli.load_config(args)

    if not config.small.path:
        raise ConfigError(message("small.path", "the small model's checkpoint", "nothing", "Set it in [small]."))
    reader = formats.open(config.small.path, None if config.small.format == "auto" else config.small.format)
    if args.operator:
        operator = Saved(Path(args.operator))
    else:
        operator = initial_operator(reader.dims, config.large, config.operator)
        print(describe(operator.settings))
    grown = Grown(operator, reader, config.handoff.moments)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.handoff.dtype]
    with cli.byte_progress() as show:
        hand_off(grown, Path(args.output), dtype, config.handoff.formats, growth_record(grown), progress=show)
    print(f"{args.output}: {', '.join(config.handoff.formats)} and growth.json")


if __name__ == "__main__":
    cli.run(main)
