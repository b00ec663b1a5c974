"""The measurements that the README quotes, each as ratios in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_ligo import bench, cli
from megatron_ligo.common.atomic_files import write_json

EXAMPLE = """
python tools/bench.py convert --gb 4 --output runs/bench_convert.json
"""


def parser() -> cli.CommandParser:
    made = cli.build_parser(__doc__, EXAMPLE)
    chosen = made.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, module in bench.load_benchmarks().items():
        one = chosen.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(one)
        one.add_argument("--output", type=Path, metavar="FILE", help="the figures as JSON")
        one.add_argument("--folder", type=Path, metavar="DIR", help="a disk to work on (default: the current folder's)")
    return made


def main() -> None:
    args = parser().parse_args()
    module = bench.load_benchmarks()[args.what]
    place = args.folder or Path()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench.", dir=place) as folder:
        results = module.measure(args, Path(folder))
    print(module.format_text(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, results)


if __name__ == "__main__":
    cli.run_command(main)
