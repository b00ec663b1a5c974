"""Compares two checkpoints of any formats bit by bit, or one to its manifest. Exits with 1 if they differ.

With --logits, the exit code depends on the logits and the manifests alone; different tensors are listed.

A may also be the --output folder of fit, grow, pretrain or stages, or a folder of several. Then every record, file and
input (small model, operator, hand-off, tokenizer, data) is compared with the digests that the runs recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megatron_ligo.checkpoint.reader import Reader
    from megatron_ligo.checkpoint.verify import ComparisonResult

EXAMPLE = """
ligo verify models/small models/small_ds --values
ligo verify model.gguf models/small --logits
ligo verify models/small
ligo verify runs --full
"""
MAX_LISTED = 50


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    parser.add_argument("a", metavar="A", help="checkpoint of any format, or the folder of a run")
    parser.add_argument("b", metavar="B", nargs="?", help="another checkpoint (default: A's manifest)")
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="format of A (default: detected)")
    cli.add_accept_option(parser)
    parser.add_argument("--values", action="store_true", help="ignore dtypes: compare the values alone")
    parser.add_argument(
        "--logits",
        action="store_true",
        help="compare logits on a fixed batch, each side by its own library; tensors may then differ",
    )
    parser.add_argument(
        "--tolerance", type=float, help="largest logit difference (default: 5e-4, for different attention kernels)"
    )
    parser.add_argument(
        "--full", action="store_true", help="of a run: read every file again, also those that have not changed since"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    cli.check_paths(args.a, args.b)
    if args.logits and args.b is None:
        raise ConfigError(Problem("--logits", "two checkpoints", "one"))

    from megatron_ligo.checkpoint import formats
    from megatron_ligo.checkpoint.content import compare_with_manifest
    from megatron_ligo.checkpoint.verify import compare, has_manifest
    from megatron_ligo.export import chain

    if args.b is None and chain.find_runs(Path(args.a)):
        sys.exit(0 if _verify_runs(Path(args.a), args.full) else 1)
    if args.full:
        raise ConfigError(Problem("--full", "the folder of a run", f"{args.a}"))
    a = formats.open(args.a, args.form, args.accept)
    if args.b is None and not has_manifest(a):
        hint = "Only folders that this program wrote have a manifest."
        raise ConfigError(Problem(f"verify {args.a}", "its manifest, or a second checkpoint", "neither", hint))
    results = (
        [_print_result(f"{args.a} and its manifest", compare_with_manifest(a))]
        if args.b is None or has_manifest(a)
        else []
    )
    if args.b is not None:
        b = formats.open(args.b)
        if has_manifest(b):
            results.append(_print_result(f"{args.b} and its manifest", compare_with_manifest(b)))
        same = _print_result(f"{args.a} and {args.b}", compare(a, b, values_only=args.values))
        results.append(_print_logits(a, b, args) if args.logits else same)
    sys.exit(0 if all(results) else 1)


def _print_logits(a: Reader, b: Reader, args: argparse.Namespace) -> bool:
    from megatron_ligo.experiments.reference_logits import LOGIT_TOLERANCE, compare_reference_logits

    logits = compare_reference_logits(a, b)
    for name, origin in zip((args.a, args.b), logits.origins, strict=True):
        print(f"logits of {name}: {origin}")
    scale = f"at a scale of {logits.scale:.3g}, {logits.compared} logits a token"
    print(f"logits: largest difference {logits.difference:.3e} {scale}")
    return logits.difference <= (LOGIT_TOLERANCE if args.tolerance is None else args.tolerance)


def _verify_runs(folder: Path, full: bool) -> bool:
    from megatron_ligo.distributed.digest_cache import DigestCache
    from megatron_ligo.export import chain

    report = chain.verify_runs(folder, DigestCache(recompute=full))
    for line in (*report.checked, *report.notes):
        print(line)
    print(f"{folder}: {'all is as recorded' if not report.problems else f'{len(report.problems)} differences'}")
    for line in report.problems[:MAX_LISTED]:
        print(f"  {line}")
    if len(report.problems) > MAX_LISTED:
        print(f"  ... and {len(report.problems) - MAX_LISTED} more")
    return not report.problems


def _print_result(subject: str, result: ComparisonResult) -> bool:
    verdict = "equal" if result.same else f"{len(result.differences)} differences"
    print(f"{subject}: {result.compared} tensors compared, {verdict}")
    for line in result.differences[:MAX_LISTED]:
        print(f"  {line}")
    if len(result.differences) > MAX_LISTED:
        print(f"  ... and {len(result.differences) - MAX_LISTED} more")
    return result.same
