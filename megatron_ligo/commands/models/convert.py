"""Converts a checkpoint of any format to another, one tensor at a time.

The target appears whole or not at all, with a digest of each file in manifest.json. An interrupted call resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common import hub_models
from megatron_ligo.common.errors import ConfigError, Problem, did_you_mean

EXAMPLE = """
ligo convert model.gguf models/small --to hf
ligo convert models/small models/small_ds --to universal
ligo convert runs/pretrain models/large --to hf --push my-org/large
ligo convert models/small models/small_bf16 --to hf --dtype bfloat16 --option shard_bytes=2000000000
"""
DTYPES = ("float32", "bfloat16", "float16")
# Stated here too, because the formats import torch; tests/test_architecture.py compares them.
WRITERS = ("deepspeed", "fairscale", "fsdp", "hf", "mcore", "megatron", "pipeline", "torchtitan", "universal")
FORMAT_OPTIONS = """
options of the formats (--option NAME=VALUE):
  deepspeed: tag  name of the folder (default global_stepN)
  fairscale: embedding  cut along the vocabulary (default: as Llama 3) or the features (as Llama 1 and 2)
  fsdp: prefix  beginning of every name (default "model.", the key of the state that is loaded)
  hf: shard_bytes  largest shard (default 5000000000)
  mcore: max_lr  highest learning rate of the run that loads Adam's moments (default: a Megatron source's own)
  mcore: min_lr  lowest one; Megatron-core 0.19 requires both, and loads moments only if they are the run's own
  mcore: vocab_divisible_by  pads the vocabulary to a multiple of it (default 1: Megatron-core pads as it loads)
  mcore: bridge  for Megatron-Bridge's AutoBridge: adds run_config.yaml, in iter_N (default false: release)
  megatron: max_lr  highest learning rate of the run that loads Adam's moments (default: a Megatron source's own)
  megatron: min_lr  lowest one; Megatron-core 0.19 requires both, and loads moments only if they are the run's own
  megatron: vocab_divisible_by  pads the vocabulary to a multiple of it times tp (default 128)
  megatron: layers  local (default) or te: names of Megatron-core's local layer spec, or of Transformer Engine's
  megatron: ep  expert-parallel ranks, each with its share of every layer's experts (default 1)
  megatron: grouped_gemm  with layers=te: experts have the names of a grouped product (default false)
  pipeline: tag  name of the folder (default global_stepN)
  universal: tag  name of the folder (default global_stepN)
  universal: moments  source (default: the source's, or zeros at step 0 where it has none) or none
  universal: param_groups  how many groups the optimizer may have (default 8)
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    count = cli.positive(int)
    parser = cli.build_parser(
        f"{__doc__}\noptions of the formats (--option NAME=VALUE):{FORMAT_OPTIONS.rstrip()}", EXAMPLE, prog=prog
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint of any format")
    parser.add_argument("target", metavar="DST", help="new folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"target format: {', '.join(WRITERS)}")
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
    parser.add_argument(
        "--push", metavar="ORG/NAME", help="with --to hf: upload DST to the Hugging Face hub; a new model is private"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing conversion at DST")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.dtype is not None and args.dtype not in DTYPES:
        raise ConfigError(Problem("--dtype", "a dtype", repr(args.dtype), did_you_mean(args.dtype, DTYPES)))
    if args.to not in WRITERS:
        raise ConfigError(
            Problem("--to", "a format that can be written", repr(args.to), did_you_mean(args.to, WRITERS))
        )
    if args.push is not None:
        if args.to != "hf":
            raise ConfigError(Problem("--push", "--to hf", f"--to {args.to}"))
        hub_models.check_push(args.push)
    cli.check_paths(args.source)
    extra = dict(map(_parse_option, args.option))

    import torch

    from megatron_ligo.checkpoint.convert import convert, open_source
    from megatron_ligo.checkpoint.format import WriteOptions

    # The writer has its own threads; torch's would spin.
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = WriteOptions(dtype=dtype, tp=args.tp, pp=args.pp, workers=args.workers, extra=extra)
    start_time = time.perf_counter()
    with cli.byte_progress() as update_progress:
        source = open_source(args.source, args.form, args.accept)
        manifest = convert(source, args.target, args.to, options, overwrite=args.overwrite, progress=update_progress)
    size, seconds = sum(manifest.files.values()), time.perf_counter() - start_time
    print(f"{args.target}: {manifest.format}, {len(manifest.tensors)} tensors, {size:,} bytes in {seconds:.1f} s")
    if args.push is not None:
        print(f"pushed to {hub_models.push_model(Path(args.target), args.push)}")
    cli.print_next(args.target, "ligo", "verify", args.source, args.target, *(["--values"] if args.dtype else []))


def _parse_option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(Problem("--option", "NAME=VALUE", repr(text)))
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
