"""Benchmarks behind the figures in the README; each compares its subjects within one run."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from megatron_ligo import bench, cli
from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
ligo bench convert --gb 4 --output runs/bench_convert.json
ligo bench convert --help
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    summaries = bench.describe_benchmarks()
    lines = ["", "", "benchmarks:", *(f"  {name:<10} {text}" for name, text in summaries.items())]
    parser = cli.build_parser(__doc__ + "\n".join(lines), EXAMPLE, prog=prog)
    parser.add_argument("benchmark", metavar="BENCHMARK", choices=sorted(summaries), help="see above")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options (BENCHMARK --help)")
    return parser


def run(args: argparse.Namespace) -> None:
    module = bench.load_benchmark(args.benchmark)
    parser = cli.CommandParser(prog=f"bench {args.benchmark}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="work in this folder, on its disk (default: the current folder)"
    )
    options = parser.parse_args(args.options)
    if options.output and options.output.is_dir():
        raise ConfigError(Problem(f"--output {options.output}", "a file to write", "a folder"))
    work_folder = options.folder or Path()
    work_folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bench.", dir=work_folder) as folder:
        results = module.measure(options, Path(folder))
    print(module.format_text(results))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.output, results)
        cli.print_wrote(options.output, "compare it with the file of another machine or version")
