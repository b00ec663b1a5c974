"""Describes a checkpoint: format, architecture, sizes, layout, step, and the shape and dtype of each tensor."""

from __future__ import annotations

import json

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats, inspect

EXAMPLE = """
python tools/inspect_checkpoint.py models/small
python tools/inspect_checkpoint.py runs/grown/universal --json
"""


def main() -> None:
    parser = cli.build_parser(__doc__, EXAMPLE)
    parser.add_argument("path", metavar="PATH", help="checkpoint of any format")
    parser.add_argument("--from", dest="form", metavar="FORMAT", help="format of the checkpoint (default: detected)")
    cli.add_accept_option(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    reader = formats.open(args.path, args.form, args.accept)
    description = inspect.describe(reader)
    print(json.dumps(description, indent=2) if args.json else inspect.to_text(description))


if __name__ == "__main__":
    cli.run_command(main)
