"""Describes a checkpoint: format, architecture, sizes, layout, step, and the shape and dtype of each tensor."""

from __future__ import annotations

import argparse
import json

from megatron_ligo import cli

EXAMPLE = """
ligo inspect models/small
ligo inspect runs/grown/universal --json
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    parser.add_argument("path", metavar="PATH", help="checkpoint of any format")
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="format of the checkpoint (default: detected)")
    cli.add_accept_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    cli.check_paths(args.path)

    from megatron_ligo.checkpoint import formats, inspect

    reader = formats.open(args.path, args.form, args.accept)
    description = inspect.describe(reader)
    if args.json:
        print(json.dumps(description, indent=2))
        return
    print(inspect.to_text(description))
    cli.print_next("", "ligo", "init", args.path, "--to", "2x")
