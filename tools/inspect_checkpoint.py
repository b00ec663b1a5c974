"""What a checkpoint is: format, architecture, sizes, layout, step, and each tensor with its shape and dtype."""

from __future__ import annotations

import json

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats, inspect

EXAMPLE = """
python tools/inspect_checkpoint.py models/small
python tools/inspect_checkpoint.py runs/grown/universal --json
"""


def main() -> None:
    made = cli.build_parser(__doc__, EXAMPLE)
    made.add_argument("path", metavar="PATH", help="a checkpoint of any format")
    made.add_argument("--from", dest="form", metavar="FORMAT", help="insist on a format")
    made.add_argument("--json", action="store_true", help="as JSON")
    args = made.parse_args()
    reader = formats.open(args.path, args.form)
    found = inspect.describe(reader)
    print(json.dumps(found, indent=2) if args.json else inspect.to_text(found))


if __name__ == "__main__":
    cli.run_command(main)
