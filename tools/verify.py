"""Are two checkpoints the same, bit for bit? One alone is held against its manifest. Exits with 1 if they differ."""

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
SHOWN = 50
# Between two kernels for attention; 0 is usual for the same weights.
TOLERANCE = 5e-4


def parser() -> cli.CommandParser:
    made = cli.build_parser(__doc__, EXAMPLE)
    made.add_argument("a", metavar="A", help="a checkpoint of any format")
    made.add_argument("b", metavar="B", nargs="?", help="another (left out: A against its manifest)")
    made.add_argument("--from", dest="form", metavar="FORMAT", help="insist on a format of A")
    made.add_argument("--values", action="store_true", help="another dtype is no difference if the numbers are equal")
    made.add_argument("--logits", action="store_true", help="compare what transformers computes on a fixed batch, too")
    made.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"of the logits (default {TOLERANCE:g})")
    return made


def main() -> None:
    args = parser().parse_args()
    a = formats.open(args.a, args.form)
    good = [_show(f"{args.a} and its manifest", check_manifest(a))] if args.b is None or has_manifest(a) else []
    if args.b is not None:
        b = formats.open(args.b)
        if has_manifest(b):
            good.append(_show(f"{args.b} and its manifest", check_manifest(b)))
        good.append(_show(f"{args.a} and {args.b}", compare(a, b, values_only=args.values)))
        if args.logits:
            far, scale = compare_logits(a, b)
            print(f"logits: largest difference {far:.3e} at a scale of {scale:.3g}")
            good.append(far <= args.tolerance)
    elif args.logits:
        raise ConfigError(Problem("--logits", "two checkpoints", "one"))
    sys.exit(0 if all(good) else 1)


def _show(what: str, report: ComparisonResult) -> bool:
    verdict = "equal" if report.same else f"{len(report.differences)} differences"
    print(f"{what}: {report.compared} tensors compared, {verdict}")
    for line in report.differences[:SHOWN]:
        print(f"  {line}")
    if len(report.differences) > SHOWN:
        print(f"  ... and {len(report.differences) - SHOWN} more")
    return report.same


if __name__ == "__main__":
    cli.run_command(main)
