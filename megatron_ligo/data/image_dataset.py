"""Images with labels: a safetensors file with `images`, uint8 (n, channels, side, side), and `labels`, int64 (n,).

Each round over the training images has an order of its own, which depends on the seed and the round alone.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ligo.arch.model_config import Dims
from megatron_ligo.common.errors import DataError, Faults
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.megatron_dataset import everywhere
from megatron_ligo.data.sampler import TRAIN, VALID, Batch, Dealt

IMAGES, LABELS = "images", "labels"
KEPT_ORDERS = 2


class File:
    """One file: images read one at a time, all labels."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as opened:
            self.labels = opened.get_tensor(LABELS)
            self.images = opened.get_slice(IMAGES)
        self.path = path

    def __len__(self) -> int:
        return len(self.labels)


class Images(Dealt):
    """The files of each split, one after the other. Made by `open_images`."""

    def __init__(self, splits: dict[str, list[File]], dims: Dims, data: DataSection, first: int = 0):
        super().__init__(first)
        self._splits = splits
        self._seed = data.seed
        self._orders: dict[int, Tensor] = {}
        channels = dims.num_channels
        self._mean, self._std = (
            torch.tensor(values).expand(channels)[:, None, None] for values in (data.pixel_mean, data.pixel_std)
        )

    def _size(self, split: str) -> int:
        # The training images come round again.
        return sys.maxsize if split == TRAIN else sum(map(len, self._splits[VALID]))

    def _micro_batch(self, split: str, numbers: range) -> Batch:
        found = [self._sample(split, number) for number in numbers]
        pixels, labels = (torch.stack(parts) for parts in zip(*found, strict=True))
        return {"tokens": pixels, "labels": labels[:, None], "loss_mask": torch.ones(len(labels), 1)}

    def _sample(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        index = self._shuffled(number) if split == TRAIN else number
        for file in self._splits[split]:
            if index < len(file):
                pixels = file.images[index : index + 1][0].float() / 255
                return (pixels - self._mean) / self._std, file.labels[index]
            index -= len(file)
        raise AssertionError(f"{split} has no image {number}")

    def _shuffled(self, number: int) -> int:
        count = sum(map(len, self._splits[TRAIN]))
        turn, place = divmod(number, count)
        if turn not in self._orders:
            digest = hashlib.sha256(f"{self._seed}:{turn}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            self._orders[turn] = torch.randperm(count, generator=generator)
            while len(self._orders) > KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
        return int(self._orders[turn][place])


def open_images(data: DataSection, dims: Dims, held_out: int, first: int = 0) -> Images:
    """Opens what [data] names for a model of these sizes. Collective: any fault is raised on all ranks as one
    DataError."""
    return everywhere(lambda: Images(_splits(data, dims, held_out), dims, data, first))


def _splits(data: DataSection, dims: Dims, held_out: int) -> dict[str, list[File]]:
    faults = Faults("data", DataError)
    splits = {}
    for split, listed in ((TRAIN, data.train), (VALID, data.valid)):
        splits[split] = [file for entry in listed if (file := _file(entry, f"data.{split}", dims, faults)) is not None]
        if not listed and (split == TRAIN or held_out):
            faults.add(f"data.{split}", "files of images", "none", "Make them with prepare_images.")
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(data, name)
        if len(values) not in (1, dims.num_channels):
            faults.add(f"data.{name}", f"one number, or one for each of {dims.num_channels} channels", list(values))
    faults.raise_if_any()
    return splits


def _file(entry: str | float, where: str, dims: Dims, faults: Faults) -> File | None:
    """A file that holds images as the model sees them and labels that it knows; None, and a fault, for any other."""
    if not isinstance(entry, str):
        faults.add(where, "files only: images have no weights", entry)
        return None
    before = len(faults.lines)
    try:
        with safe_open(entry, "pt") as opened:
            names = set(opened.keys())
            for name in {IMAGES, LABELS} - names:
                faults.add(f"{entry}: {name}", "a tensor", "none")
            if names >= {IMAGES, LABELS}:
                _check(opened, entry, dims, faults)
    except (OSError, SafetensorError) as error:
        faults.add(entry, "a safetensors file", error, "Make it with prepare_images.")
    return File(Path(entry)) if len(faults.lines) == before else None


def _check(opened: safe_open, where: str, dims: Dims, faults: Faults) -> None:
    images, labels = opened.get_slice(IMAGES), opened.get_slice(LABELS)
    count, *shape = images.get_shape() or [0]
    expected = [dims.num_channels, dims.image_size, dims.image_size]
    if images.get_dtype() != "U8" or shape != expected:
        wanted = f"uint8, n x {' x '.join(map(str, expected))}, as the model sees them"
        found = f"{images.get_dtype()}, {' x '.join(map(str, images.get_shape()))}"
        faults.add(f"{where}: {IMAGES}", wanted, found)
    if labels.get_dtype() != "I64" or labels.get_shape() != [count] or not count:
        found = f"{labels.get_dtype()}, {' x '.join(map(str, labels.get_shape()))}"
        faults.add(f"{where}: {LABELS}", f"int64, one for each of {count} images (and at least one)", found)
        return
    told = opened.get_tensor(LABELS)
    least, most = int(told.min()), int(told.max())
    if least < 0 or most >= dims.vocab_size:
        faults.add(f"{where}: {LABELS}", f"0 to {dims.vocab_size - 1}, as the model has", f"{least} to {most}")
