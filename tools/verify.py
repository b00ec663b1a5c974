"""Compares two checkpoints of any formats bit by bit, or one to its manifest. Exits with 1 if they differ."""

from __future__ import annotations

import sys

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.verify import ComparisonResult, check_manifest, compare, compare_logits, has_manifest
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
python tools/verify.py models/small models/small_ds --values
python tools/verify.py model.gguf models/small --logits
python tools/verify.py models/small
"""
MAX_LISTED = 50
# Covers different attention kernels; equal weights usually give a difference of 0.
TOLERANCE = 5e-4


def build_parser() -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE)
    parser.add_argument("a", metavar="A", help="checkpoint of any format")
    parser.add_argument("b", metavar="B", nargs="?", help="another checkpoint (default: A's manifest)")
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="format of A (default: detected)")
    cli.add_accept_option(parser)
    parser.add_argument("--values", action="store_true", help="ignore dtypes: compare the values alone")
    parser.add_argument(
        "--logits", action="store_true", help="also compare logits on a fixed batch, computed by transformers"
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"largest logit difference (default: {TOLERANCE:g})"
    )
    return parser


def main() -> None:
    args = build_parser().parse_args()
    a = formats.open(args.a, args.form, args.accept)
    results = (
        [_print_result(f"{args.a} and its manifest", check_manifest(a))] if args.b is None or has_manifest(a) else []
    )
    if args.b is not None:
        b = formats.open(args.b)
        if has_manifest(b):
            results.append(_print_result(f"{args.b} and its manifest", check_manifest(b)))
        results.append(_print_result(f"{args.a} and {args.b}", compare(a, b, values_only=args.values)))
        if args.logits:
            difference, scale = compare_logits(a, b)
            print(f"logits: largest difference {difference:.3e} at a scale of {scale:.3g}")
            results.append(difference <= args.tolerance)
    elif args.logits:
        raise ConfigError(Problem("--logits", "two checkpoints", "one"))
    sys.exit(0 if all(results) else 1)


def _print_result(subject: str, result: ComparisonResult) -> bool:
    verdict = "equal" if result.same else f"{len(result.differences)} differences"
    print(f"{subject}: {result.compared} tensors compared, {verdict}")
    for line in result.differences[:MAX_LISTED]:
        print(f"  {line}")
    if len(result.differences) > MAX_LISTED:
        print(f"  ... and {len(result.differences) - MAX_LISTED} more")
    return result.same


if __name__ == "__main__":
    cli.run_command(main)
