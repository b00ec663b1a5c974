"""Images with labels to the files that training reads: train.safetensors and valid.safetensors."""

from __future__ import annotations

from pathlib import Path

from megatron_ligo import cli
from megatron_ligo.common.errors import ConfigError, Problem

EXAMPLE = """
python tools/prepare_images.py pictures.npz --output data
pip install --no-deps --target packages scikit-learn; python tools/prepare_images.py --digits packages --output data
"""


def parser() -> cli.CommandParser:
    made = cli.build_parser(__doc__, EXAMPLE, output="folder for train.safetensors and valid.safetensors")
    add = made.add_argument
    add("input", nargs="?", metavar="NPZ", help="images, uint8 (n, [channels,] side, side), and labels, integers (n,)")
    add("--digits", default="", metavar="FOLDER", help="scikit-learn's 1797 handwritten digits, unpacked there")
    add("--valid-fraction", type=float, default=0.2, help="part of the images that is held out (default: 0.2)")
    return made


def main() -> None:
    args = parser().parse_args()
    if bool(args.input) == bool(args.digits):
        raise ConfigError(Problem("input", "one of a file and --digits", "none or both"))
    if not 0 < args.valid_fraction < 1:
        raise ConfigError(Problem("--valid-fraction", "more than 0 and less than 1", args.valid_fraction))
    from megatron_ligo.data.prepare_images import prepare_images, read_digits, read_npz

    images, labels = read_digits(Path(args.digits)) if args.digits else read_npz(Path(args.input))
    counts = prepare_images(images, labels, Path(args.output), args.valid_fraction)
    for split, count in counts.items():
        print(f"{args.output}/{split}.safetensors: {count} images of {' x '.join(map(str, images.shape[1:]))}")


if __name__ == "__main__":
    cli.run_command(main)
