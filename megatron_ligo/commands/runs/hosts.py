"""Checks a hostfile (a line `NAME slots=PROCESSES` per node) and prints its number of processes.

launch_scripts/hosts.sh, node.sh and slurm.sbatch call it before they start anything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.distributed.hostfile import check_node, read_hostfile

EXAMPLE = """
ligo hosts hosts
ligo hosts hosts --node-rank 1
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, prog=prog)
    parser.add_argument("hostfile", metavar="HOSTFILE", type=Path, help="file with a line per node")
    parser.add_argument("--node-rank", type=int, metavar="N", help="also check that this machine can be node N")
    return parser


def run(args: argparse.Namespace) -> None:
    hosts = read_hostfile(args.hostfile)
    if args.node_rank is not None:
        check_node(hosts, args.node_rank, args.hostfile)
    print(sum(hosts.values()))
