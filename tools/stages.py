"""Growth in stages: models that are trained and grown into one another, as one file says.

    [shared.data] ...                               sections of a run's config that all stages have
    [[stages]]                                      one model; they stand in order
    name = "small"                                  its folder in --output
    launcher = ["deepspeed", "--num_gpus", "4"]     words before its commands; left out: one plain process
    [stages.large] ...                              sections of its own, put over the shared ones

The first stage trains a model of the sizes that [small] and [large] name, or from pretrain.start: no pretrained model
is needed. Every other one grows what the one before has trained, with a fit first if its [fit] names steps, and trains
the grown model. Killed and run again, it goes on at that very step; chain.json tells the lineage, report/ the losses
against all FLOPs since the first stage.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli

EXAMPLE = """
python tools/stages.py chain.toml --output runs/chain
"""


def main() -> None:
    made = cli.build_parser(__doc__, EXAMPLE, output="a folder for each stage, chain.json and report/")
    made.add_argument("chain", metavar="CHAIN.toml", help="the stages, and the sections that they share")
    args = made.parse_args()
    # Imported here: --help need not wait for it.
    from megatron_ligo.experiments import staged_growth

    output = Path(args.output)
    staged_growth.run_stages(
        staged_growth.load_stages(Path(args.chain), output), output, lambda text: print(f"== {text}", flush=True)
    )
    print(f"{output / staged_growth.RECORD} and {output / 'report'} are written")


if __name__ == "__main__":
    cli.run_command(main)
