"""Writes a commented run.toml that grows a model to about a number of parameters, and shows its plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.atomic_files import write_bytes
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION
from megatron_ligo.common.terminal_text import one_line
from megatron_ligo.config.toml_tables import format_value

EXAMPLE = """
ligo init models/small --to 1.3B --data runs/data
ligo init models/small --to 300M --processes 4 --tp 2 --device-memory 24
"""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}

TEMPLATE = """# Grows {small} ({small_count} parameters) to about {large_count}. `ligo fit --help` lists every key.

[small]
path = {small_path}

[large]  # heads keep their size and their ratio to KV heads, so that the start can be lossless
{sizes}

[operator]
method = "lossless"  # `ligo advise --config {config} --minutes 30 --output runs/advice` compares methods on your text

[fit]
steps = 100
global_batch_size = {batch}  # a multiple of micro_batch_size x dp; dp = processes / (tp x cp x pp)
precision = "{precision}"

[fit.parallel]
tp = {tp}

[pretrain]
start = "runs/grown"  # what `ligo grow` writes
steps = 1000
global_batch_size = {batch}
precision = "{precision}"
lr = 3e-4  # a grown model starts at grown_peak (0.5) of it

[pretrain.parallel]
tp = {tp}

[data]
train = [{train}]  # written by `ligo prepare TEXTS --tokenizer {small} --output {data}`
valid = [{valid}]
seq_length = {length}
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    count = cli.positive(int)
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    add = parser.add_argument
    add("small", metavar="SMALL", help="checkpoint of the small model")
    add("--to", required=True, type=_parameters, metavar="N", help="parameters of the large model: 300M, 1.3B")
    add("--data", default="runs/data", metavar="DIR", help="folder of `ligo prepare` (default: runs/data)")
    # Not `processes`: this command starts none.
    add("--processes", dest="world", type=count, default=1, metavar="N", help="processes of the run (default: 1)")
    add("--tp", type=count, default=1, help="tensor-parallel size of the run (default: 1)")
    add("--device-memory", type=cli.positive(float), default=80.0, metavar="GB", help="of one device (default: 80)")
    add("--tflops", type=cli.positive(float), default=300.0, help="sustained TFLOP/s of one device (default: 300)")
    add("--output", type=Path, default=Path("run.toml"), metavar="FILE", help="file to write (default: run.toml)")
    return parser


def _parameters(text: str) -> float:
    """Parses 300M or 1.3B."""
    unit = UNITS.get(text[-1:].upper())
    try:
        return cli.positive(float)(text if unit is None else text[:-1]) * (unit or 1)
    except ValueError:
        message = f"expected a number of parameters, such as 300M or 1.3B, found {text}"
        raise argparse.ArgumentTypeError(message) from None


def run(args: argparse.Namespace) -> None:
    cli.check_paths(args.small)
    if args.output.exists():
        raise ConfigError(Problem(f"--output {args.output}", "a new file", "one that exists", "It stays as it is."))
    if args.world % args.tp:
        raise ConfigError(Problem("--processes", f"a multiple of --tp {args.tp}", args.world))

    from megatron_ligo.config.run_config import RunConfig
    from megatron_ligo.growth.validation import derive_large_config
    from megatron_ligo.planning.parameter_count import count_model
    from megatron_ligo.planning.plan_text import format_count
    from megatron_ligo.planning.run_plan import plan_run
    from megatron_ligo.planning.size_search import choose_sizes
    from megatron_ligo.training.initial_weights import read_model_config

    small = read_model_config(Path(args.small))
    section = choose_sizes(small, args.to, args.tp)
    sizes = {name: value for name, value in vars(section).items() if value is not None}
    dp = args.world // args.tp
    text = TEMPLATE.format(
        small=one_line(args.small),
        small_path=format_value(args.small),
        small_count=format_count(count_model(small)),
        large_count=format_count(count_model(derive_large_config(small, section))),
        sizes="\n".join(f"{name} = {value}  # {getattr(small, name)}" for name, value in sizes.items()),
        config=one_line(args.output),
        batch=-(-8 // dp) * dp,
        precision="bf16" if DRIVER_VERSION.is_file() else "fp32",
        tp=args.tp,
        data=one_line(args.data),
        train=format_value(f"{args.data}/train"),
        valid=format_value(f"{args.data}/valid"),
        length=min(1024, small.max_positions),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(args.output, text.encode())
    print(plan_run(RunConfig.load(args.output), args.world, args.device_memory * 1e9, args.tflops * 1e12))
    processes = ["--processes", args.world] if args.world > 1 else []
    cli.print_next(args.output, "ligo", "fit", *processes, "--config", args.output, "--output", "runs/fit")
