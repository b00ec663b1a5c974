"""Benchmarks behind the figures in the README; each compares its subjects within one run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_ligo import bench, cli
from megatron_ligo.common.atomic_files import write_json

EXAMPLE = """
python tools/bench.py convert --gb 4 --output runs/bench_convert.json
"""


def build_parser() -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE)
    subparsers = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for name, module in bench.load_benchmarks().items():
        subparser = subparsers.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(subparser)
        subparser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
        subparser.add_argument(
            "--folder", type=Path, metavar="DIR", help="work in this folder, on its disk (default: the current folder)"
        )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    module = bench.load_benchmarks()[args.benchmark]
    work_folder = args.folder or Path()
    work_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench.", dir=work_folder) as folder:
        results = module.measure(args, Path(folder))
    print(module.format_text(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, results)


if __name__ == "__main__":
    cli.run_command(main)
