"""Converts a checkpoint of any format to another, one tensor at a time.

The target appears whole or not at all, with a digest of each file in manifest.json. An interrupted call resumes.
"""

from __future__ import annotations

import json
import time
from dataclasses import fields

import torch

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert, open_source
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.common.errors import ConfigError, Problem, did_you_mean

EXAMPLE = """
python tools/convert.py model.gguf models/small --to hf
python tools/convert.py models/small models/small_ds --to universal
python tools/convert.py models/small models/small_bf16 --to hf --dtype bfloat16 --option shard_bytes=2000000000
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_parser() -> cli.CommandParser:
    count = cli.positive(int)
    parser = cli.build_parser(f"{__doc__}\n{_list_format_options()}", EXAMPLE)
    parser.add_argument("source", metavar="SRC", help="checkpoint of any format")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"target format: {', '.join(formats.writers())}")
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="format of SRC (default: detected)")
    cli.add_accept_option(parser)
    parser.add_argument("--dtype", metavar="DTYPE", help=f"cast to {', '.join(DTYPES)} (default: no cast)")
    parser.add_argument("--tp", type=count, default=1, help="tensor-parallel size of DST, if its format is sharded")
    parser.add_argument("--pp", type=count, default=1, help="pipeline-parallel size of DST, if its format is sharded")
    parser.add_argument(
        "--workers", type=count, default=2, metavar="N", help="threads that hash and write (default: 2)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="option of the target format (listed above)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing conversion at DST")
    return parser


def _list_format_options() -> str:
    lines = ["options of the formats (--option NAME=VALUE):"]
    for name in formats.writers():
        for field in fields(formats.get(name).options):
            lines.append(f"  {name}: {field.name}  {field.metadata['help']}")
    return "\n".join(lines)


def main() -> None:
    args = build_parser().parse_args()
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ConfigError(Problem("--dtype", "a dtype", repr(args.dtype), did_you_mean(args.dtype, DTYPES)))
    # The writer has its own threads; torch's would spin.
    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype] if args.dtype else None
    options = WriteOptions(
        dtype=dtype, tp=args.tp, pp=args.pp, workers=args.workers, extra=dict(map(_parse_option, args.option))
    )
    start_time = time.perf_counter()
    with cli.byte_progress() as update_progress:
        source = open_source(args.source, args.form, args.accept)
        manifest = convert(source, args.target, args.to, options, overwrite=args.overwrite, progress=update_progress)
    size, seconds = sum(manifest.files.values()), time.perf_counter() - start_time
    print(f"{args.target}: {manifest.format}, {len(manifest.tensors)} tensors, {size:,} bytes in {seconds:.1f} s")


def _parse_option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(Problem("--option", "NAME=VALUE", repr(text)))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    cli.run_command(main)
