"""Writes labelled images to the files that `image_dataset` reads; the same input gives the same bytes.

Images are held out by a hash of their pixels, so that equal images fall into the same split.
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
from megatron_ligo.common.folder_kinds import DATA, check_output
from megatron_ligo.data.image_dataset import IMAGES, LABELS
from megatron_ligo.data.sampler import TRAIN, VALID

LabelledImages = tuple[np.ndarray, np.ndarray]  # images uint8 (n, channels, side, side), labels int64 (n,)
DIGITS_FILE = Path("sklearn", "datasets", "data", "digits.csv.gz")


def read_npz(path: Path) -> LabelledImages:
    """Reads an .npz with `images`, uint8 (n, [channels,] side, side), and `labels`, integers (n,)."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays[IMAGES], arrays[LABELS]
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(Problem(f"{path}", f"an .npz with {IMAGES} and {LABELS}", _describe(path, error))) from None
    if images.ndim == 3:
        images = images[:, None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
        expected = "uint8, n x side x side or n x channels x side x side"
        raise DataError(Problem(f"{path}: {IMAGES}", expected, f"{images.dtype}, {images.shape}"))
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        expected = f"integers, one per image ({len(images)})"
        raise DataError(Problem(f"{path}: {LABELS}", expected, f"{labels.dtype}, {labels.shape}"))
    return images, labels.astype(np.int64)


def read_digits(folder: Path) -> LabelledImages:
    """Reads scikit-learn's 1797 handwritten digits (8 x 8, one channel) from a folder with its unpacked package.

    Unpack it instead of installing it: transformers imports an installed scikit-learn at every start.
    """
    try:
        table = np.loadtxt(folder / DIGITS_FILE, delimiter=",", ndmin=2)
    except (OSError, ValueError, EOFError) as error:
        hint = f"pip install --no-deps --target {folder} scikit-learn"
        fault = _describe(folder / DIGITS_FILE, error)
        raise DataError(Problem(f"{folder / DIGITS_FILE}", "scikit-learn's digits", fault, hint)) from None
    if table.shape[1] != 65 or table.min() < 0 or table.max() > 16:
        found = f"{table.shape[1]}, {table.min()} to {table.max()}"
        raise DataError(Problem(f"{folder / DIGITS_FILE}", "rows of 64 numbers from 0 to 16 and a label", found))
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8)  # stored as 0 to 16
    return images.reshape(-1, 1, 8, 8), table[:, -1].astype(np.int64)


def _describe(path: Path, error: Exception) -> str:
    """Returns what is there instead of a file that could not be read: numpy's own words name no kind."""
    if not path.exists():
        return "nothing there"
    if path.is_dir():
        return "a folder"
    is_other = path.suffix != ".gz" and isinstance(error, ValueError | TypeError) and not zipfile.is_zipfile(path)
    return "another kind of file" if is_other else f"{error}"


def prepare_images(images: np.ndarray, labels: np.ndarray, output: Path, valid_fraction: float) -> dict[str, int]:
    """Writes OUTPUT/train.safetensors and OUTPUT/valid.safetensors; returns the number of images in each.

    Existing files must have the same content. Raises DataError otherwise, and for an empty split.
    """
    check_output(output, DATA)
    hashes = np.array([xxhash.xxh3_64_intdigest(image.tobytes()) / 2**64 for image in images])
    selected = {VALID: hashes < valid_fraction, TRAIN: hashes >= valid_fraction}
    contents = {}
    for split, is_selected in selected.items():
        if not is_selected.any():
            found = f"none of {len(images)}"
            raise DataError(Problem(f"{split} images", "at least one", found, "Provide more images."))
        tensors = {
            IMAGES: torch.from_numpy(images[is_selected]).contiguous(),
            LABELS: torch.from_numpy(labels[is_selected]).contiguous(),
        }
        contents[output / f"{split}.safetensors"] = save(tensors)
    with exclusive_access(output):
        for path, content in contents.items():
            if path.exists() and path.read_bytes() != content:
                hint = "Choose another --output."
                raise DataError(Problem(f"{path}", "no file, or one with the same images", "other images", hint))
        for path, content in contents.items():
            write_bytes(path, content)
    return {split: int(is_selected.sum()) for split, is_selected in selected.items()}
