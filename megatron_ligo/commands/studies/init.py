"""Writes a commented run.toml that grows a model to about a number of parameters, and shows its plan."""

from __future__ import annotations

import argparse
import shlex
import tomllib
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.atomic_files import write_bytes
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.common.nvidia_driver import DRIVER_VERSION
from megatron_ligo.common.terminal_text import one_line
from megatron_ligo.config.toml_tables import format_value

EXAMPLE = """
ligo init models/small --to 1.3B --data runs/data
ligo init models/small --to 2x --processes 4 --tp 2 --device-memory 24
"""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}

TEMPLATE = """# Grows {small} ({small_count} parameters) to about {large_count}. `ligo fit --help` lists every key.

[small]
path = {small_path}

[large]  # heads keep their size and their ratio to KV heads
{sizes}

[operator]  # `ligo advise --config {config} --minutes 30 --output runs/advice` compares methods on your data
method = "{method}"  # {promise}
# For a small model trained little, and a long run, try "corner". Train the small one on while it still falls as fast.

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
train = [{train}]  # written by `{prepare}`
valid = [{valid}]
{length}"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    count = cli.positive(int)
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    add = parser.add_argument
    add("small", metavar="SMALL", help="checkpoint of the small model")
    add("--to", required=True, type=_parameters, metavar="N", help="parameters of the large model: 300M, 1.3B, 2x")
    add("--data", default="runs/data", metavar="DIR", help="folder of `ligo prepare` (default: runs/data)")
    # Not `processes`: this command starts none.
    add("--processes", dest="world", type=count, default=1, metavar="N", help="processes of the run (default: 1)")
    add("--tp", type=count, default=1, help="tensor-parallel size of the run (default: 1)")
    add("--device-memory", type=cli.positive(float), default=80.0, metavar="GB", help="of one device (default: 80)")
    add("--tflops", type=cli.positive(float), default=300.0, help="sustained TFLOP/s of one device (default: 300)")
    add("--output", type=Path, default=Path("run.toml"), metavar="FILE", help="file to write (default: run.toml)")
    return parser


class Times(float):
    """A multiple of the small model's parameters."""


def _parameters(text: str) -> float:
    """Parses 300M, 1.3B or 2x."""
    unit = UNITS.get(text[-1:].upper())
    try:
        if text[-1:] == "x":
            return Times(cli.positive(float)(text[:-1]))
        return cli.positive(float)(text if unit is None else text[:-1]) * (unit or 1)
    except ValueError:
        message = f"expected a number of parameters, such as 300M or 1.3B, or a multiple, such as 2x, found {text}"
        raise argparse.ArgumentTypeError(message) from None


def run(args: argparse.Namespace) -> None:
    cli.check_paths(args.small)
    if args.output.exists():
        raise ConfigError(Problem(f"--output {args.output}", "a new file", "one that exists", "It stays as it is."))
    if args.world % args.tp:
        raise ConfigError(Problem("--processes", f"a multiple of --tp {args.tp}", args.world))

    from megatron_ligo import arch as architectures
    from megatron_ligo.config.run_config import RunConfig
    from megatron_ligo.growth.methods import can_be_lossless
    from megatron_ligo.growth.validation import derive_large_config
    from megatron_ligo.planning.parameter_count import count_model
    from megatron_ligo.planning.plan_text import format_count
    from megatron_ligo.planning.run_plan import plan_run
    from megatron_ligo.planning.size_search import choose_sizes
    from megatron_ligo.training.initial_weights import read_model_config

    small = read_model_config(Path(args.small))
    family, count = architectures.get(small.arch), count_model(small)
    section = choose_sizes(small, args.to * count if isinstance(args.to, Times) else args.to, args.tp)
    large = derive_large_config(small, section)
    sizes = {name: value for name, value in vars(section).items() if value is not None}
    dp = args.world // args.tp
    method, promise = "lossless", "starts with the small model's logits"
    if not family.pre_norm and large.num_layers > small.num_layers:
        method, promise = "stack", "with norms after the residual sums no start with more layers is lossless"
    elif not can_be_lossless(small, large):
        promise = "not lossless at these sizes: only a whole multiple of hidden_size keeps a LayerNorm's mean"
    prepare = ["ligo", "prepare", "TEXTS", "--tokenizer", args.small, "--output", args.data]
    if family.reads_images:
        prepare = ["ligo", "prepare-images", "IMAGES.npz", "--output", args.data]
    data = [Path(args.data, f"{split}.safetensors" if family.reads_images else split) for split in ("train", "valid")]
    text = TEMPLATE.format(
        small=one_line(args.small),
        small_path=format_value(args.small),
        small_count=format_count(count),
        large_count=format_count(count_model(large)),
        sizes="\n".join(f"{name} = {value}  # small model: {getattr(small, name)}" for name, value in sizes.items()),
        config=one_line(args.output),
        method=method,
        promise=promise,
        batch=-(-8 // dp) * dp,
        precision="bf16" if DRIVER_VERSION.is_file() else "fp32",
        tp=args.tp,
        prepare=one_line(shlex.join(prepare)),
        train=format_value(f"{data[0]}"),
        valid=format_value(f"{data[1]}"),
        length="" if family.reads_images else f"seq_length = {min(1024, small.max_positions)}\n",
    )
    config = RunConfig.from_dict(tomllib.loads(text), f"config {args.output}")
    print(plan_run(config, args.world, args.device_memory * 1e9, args.tflops * 1e12))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(args.output, text.encode())
    if not all((path if family.reads_images else Path(f"{path}.idx")).is_file() for path in data):
        cli.print_next(args.output, *prepare)
        return
    processes = ["--processes", args.world] if args.world > 1 else []
    cli.print_next(args.output, "ligo", "fit", *processes, "--config", args.output, "--output", "runs/fit")
