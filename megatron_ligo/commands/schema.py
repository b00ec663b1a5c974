"""Prints the JSON schema of run.toml, by which an editor completes and checks its keys.

Editors with Even Better TOML or taplo read it from the first line of the file: `#:schema run.schema.json`.
"""

from __future__ import annotations

import argparse
import json

from megatron_ligo import cli
from megatron_ligo.config.json_schema import build_schema

EXAMPLE = "ligo schema > run.schema.json"


def build_parser(prog: str | None = None) -> cli.CommandParser:
    return cli.build_parser(__doc__, EXAMPLE, prog=prog)


def run(args: argparse.Namespace) -> None:
    print(json.dumps(build_schema(), indent=2))
