"""Any format to any other, tensor by tensor: all or nothing, digested, taken up again after an interrupt."""

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


def parser() -> cli.CommandParser:
    made = cli.build_parser(f"{__doc__}\n\n{_options()}", EXAMPLE)
    made.add_argument("source", metavar="SRC", help="a checkpoint of any format")
    made.add_argument("target", metavar="DST", help="a new folder")
    made.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {', '.join(formats.writers())}")
    made.add_argument("--from", dest="form", metavar="FORMAT", help="insist on a format of SRC")
    made.add_argument("--dtype", metavar="DTYPE", help=f"cast to {', '.join(DTYPES)} (default: as they are)")
    made.add_argument("--tp", type=int, default=1, help="tensor parallelism of DST, where its format has one")
    made.add_argument("--pp", type=int, default=1, help="pipeline parallelism of DST, where its format has one")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="threads that hash and write (default 2)")
    made.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="one of DST's format's own")
    made.add_argument("--overwrite", action="store_true", help="put DST in the place of another conversion")
    return made


def _options() -> str:
    lines = ["options of the formats (--option NAME=VALUE):"]
    for name in formats.writers():
        for field in fields(formats.get(name).options):
            lines.append(f"  {name}: {field.name}  {field.metadata['help']}")
    return "\n".join(lines)


def main() -> None:
    args = parser().parse_args()
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {args.dtype!r}. {did_you_mean(args.dtype, DTYPES)}")
    # Its own threads write; torch's would only wait for each other, spinning.
    torch.set_num_threads(1)
    dtype = DTYPES[args.dtype] if args.dtype else None
    options = WriteOptions(
        dtype=dtype, tp=args.tp, pp=args.pp, workers=args.workers, extra=dict(map(_option, args.option))
    )
    start = time.perf_counter()
    with cli.byte_progress() as show:
        source = open_source(args.source, args.form)
        made = convert(source, args.target, args.to, options, overwrite=args.overwrite, progress=show)
    size, seconds = sum(made.files.values()), time.perf_counter() - start
    print(
        f"{args.target}: {made.format}, {len(made.tensors)} tensors, {size:,} bytes in {seconds:.1f} s, manifest.json"
    )


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(Problem("--option", "NAME=VALUE", repr(text)))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


if __name__ == "__main__":
    cli.run_command(main)
