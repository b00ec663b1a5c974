"""Images and labels to the files that training reads (pictures.py), the same bytes every time.

Images are held out by the digest of their pixels, so that equal ones fall on one side.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import save

from megatron_ligo.common.atomic_files import write_bytes
from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.data.image_dataset import IMAGES, LABELS
from megatron_ligo.data.sampler import TRAIN, VALID

LabelledImages = tuple[np.ndarray, np.ndarray]  # images uint8 (n, channels, side, side), labels int64 (n,)
DIGITS_FILE = Path("sklearn", "datasets", "data", "digits.csv.gz")


def read_npz(path: Path) -> LabelledImages:
    """An .npz with `images`, uint8 (n, side, side) or (n, channels, side, side), and `labels`, whole numbers (n,)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[IMAGES], arrays[LABELS]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(Problem(f"{path}", f"an .npz with {IMAGES} and {LABELS}", error)) from None
    if images.ndim == 3:
        images = images[:, None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        expected = "uint8, n x side x side or n x channels x side x side"
        raise DataError(Problem(f"{path}: {IMAGES}", expected, f"{images.dtype}, {images.shape}"))
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        expected = f"whole numbers, one for each of {len(images)} images"
        raise DataError(Problem(f"{path}: {LABELS}", expected, f"{labels.dtype}, {labels.shape}"))
    return images, labels.astype(np.int64)


def read_digits(folder: Path) -> LabelledImages:
    """scikit-learn's 1797 handwritten digits (8 x 8, one channel) from a folder into which its package was unpacked.

    It need not be installed, and had better not be: transformers would load all of it at each start.
    """
    try:
        table = np.loadtxt(folder / DIGITS_FILE, delimiter=",", ndmin=2)
    except (OSError, ValueError, EOFError) as error:
        hint = f"pip install --no-deps --target {folder} scikit-learn"
        raise DataError(Problem(f"{folder / DIGITS_FILE}", "scikit-learn's digits", error, hint)) from None
    if table.shape[1] != 65 or table.min() < 0 or table.max() > 16:
        found = f"{table.shape[1]}, {table.min()} to {table.max()}"
        raise DataError(Problem(f"{folder / DIGITS_FILE}", "lines of 64 numbers from 0 to 16 and a label", found))
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return images.reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)


def prepare_images(images: np.ndarray, labels: np.ndarray, output: Path, valid_fraction: float) -> dict[str, int]:
    """Writes OUTPUT/train.safetensors and OUTPUT/valid.safetensors; gives the counts. Written aside and renamed; files
    that are there must be the same."""
    drawn = np.array([xxhash.xxh3_64_intdigest(image.tobytes()) / 2**64 for image in images])
    chosen = {VALID: drawn < valid_fraction, TRAIN: drawn >= valid_fraction}
    made = {}
    for split, mine in chosen.items():
        if not mine.any():
            raise DataError(Problem(f"{split} images", "at least one", f"none of {len(images)}", "Take more."))
        tensors = {IMAGES: torch.from_numpy(images[mine]), LABELS: torch.from_numpy(labels[mine])}
        made[output / f"{split}.safetensors"] = save({name: held.contiguous() for name, held in tensors.items()})
    with exclusive_access(output):
        for place, content in made.items():
            if place.exists() and place.read_bytes() != content:
                raise DataError(Problem(f"{place}", "the same images, or none", "others", "Choose another --output."))
        for place, content in made.items():
            write_bytes(place, content)
    return {split: int(mine.sum()) for split, mine in chosen.items()}
