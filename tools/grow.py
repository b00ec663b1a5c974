"""Applies an operator, learned or a named initialisation, to a checkpoint: tensor by tensor, never holding it whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.export.handoff import grow_from_config

EXAMPLE = """
python tools/grow.py --config run.toml --operator runs/fit/operator --output runs/grown
python tools/grow.py --config run.toml --set operator.method=noisy_stack --output runs/unlearned
deepspeed --num_gpus 4 tools/grow.py --config run.toml --operator runs/fit/operator --output runs/grown
"""


def main() -> None:
    parser = cli.build_parser(
        "Grows the small model into a hand-off: DeepSpeed's universal checkpoint at iteration 0 (any tp, pp, dp and\n"
        "ZeRO stage), the Hugging Face folder, and growth.json. Without --operator, by the initialisation that\n"
        "[operator] names. Under the deepspeed launcher the processes share the work, on one file system: the bytes\n"
        "are the same. Interrupted and started again, it goes on where it stopped.",
        EXAMPLE,
        sections=("small", "large", "operator", "handoff"),
        output="the hand-off: universal/, hf/, growth.json",
    )
    parser.add_argument("--operator", metavar="DIR", help="the folder `operator` that a fit wrote")
    args = parser.parse_args()
    config = cli.load_config(args)
    with _all(config) as ranks:
        with cli.byte_progress() as show:
            grow_from_config(config, args.operator and Path(args.operator), Path(args.output), show, ranks)
        if ranks.rank == 0:
            print(f"{args.output}: {', '.join(config.handoff.formats)} and growth.json")


@contextmanager
def _all(config: RunConfig) -> Iterator[RankGroup]:
    """Yields the ranks that share the work: this process alone, or all that the launcher started."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield SINGLE_RANK
        return
    # One process alone must not load Megatron-core.
    from megatron_ligo.distributed import mesh
    from megatron_ligo.distributed.rank_failures import report_failures

    with report_failures():
        mesh.init_distributed(config.handoff.timeout_minutes)
        yield mesh.all_ranks()


if __name__ == "__main__":
    cli.run_command(main)
