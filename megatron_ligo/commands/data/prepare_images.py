"""Converts labelled images to the files that training reads: train.safetensors and valid.safetensors."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.commands.data import print_next_of_data
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
ligo prepare-images pictures.npz --output data
pip install --no-deps --target packages scikit-learn; ligo prepare-images --digits packages --output data
"""


def build_parser(prog: str | None = None) -> cli.CommandParser:
    parser = cli.build_parser(__doc__, EXAMPLE, output="folder for train.safetensors and valid.safetensors", prog=prog)
    add = parser.add_argument
    add("input", nargs="?", metavar="NPZ", help="images: uint8 (n, [channels,] side, side); labels: integers (n,)")
    add(
        "--digits",
        default="",
        metavar="FOLDER",
        help="use the 1797 digits of the scikit-learn package unpacked in this folder",
    )
    add("--valid-fraction", type=float, default=0.2, help="fraction of images to hold out (default: 0.2)")
    return parser


def run(args: argparse.Namespace) -> None:
    if bool(args.input) == bool(args.digits):
        raise ConfigError(Problem("input", "exactly one of NPZ and --digits", "none or both"))
    if not 0 < args.valid_fraction < 1:
        raise ConfigError(Problem("--valid-fraction", "more than 0 and less than 1", args.valid_fraction))
    from megatron_ligo.data.prepare_images import prepare_images, read_digits, read_npz

    images, labels = read_digits(Path(args.digits)) if args.digits else read_npz(Path(args.input))
    counts = prepare_images(images, labels, Path(args.output), args.valid_fraction)
    for split, count in counts.items():
        print(f"{args.output}/{split}.safetensors: {count} images of {' x '.join(map(str, images.shape[1:]))}")
    settings = [f'data.{split}=["{args.output}/{split}.safetensors"]' for split in counts]
    print_next_of_data(args.output, settings, "SMALL")
