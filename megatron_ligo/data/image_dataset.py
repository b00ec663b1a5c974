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

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import DataError, ErrorCollector
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.sampler import TRAIN, VALID, Batch, ShardedSampler
from megatron_ligo.distributed.mesh import all_ranks

IMAGES, LABELS = "images", "labels"
CACHED_PERMUTATIONS = 2


class ImageFile:
    """One file: images read one at a time, all labels."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as opened:
            self.labels = opened.get_tensor(LABELS)
            self.images = opened.get_slice(IMAGES)
        self.path = path

    def __len__(self) -> int:
        return len(self.labels)


class ImageDataset(ShardedSampler):
    """The files of each split, one after the other. Made by `open_image_dataset`."""

    def __init__(
        self, splits: dict[str, list[ImageFile]], model_config: ModelConfig, data: DataSection, first: int = 0
    ):
        super().__init__(first)
        self._splits = splits
        self._seed = data.seed
        self._permutations: dict[int, Tensor] = {}
        channels = model_config.num_channels
        self._mean, self._std = (
            torch.tensor(values).expand(channels)[:, None, None] for values in (data.pixel_mean, data.pixel_std)
        )

    def _num_samples(self, split: str) -> int:
        # The training images come round again.
        return sys.maxsize if split == TRAIN else sum(map(len, self._splits[VALID]))

    def _read_micro_batch(self, split: str, numbers: range) -> Batch:
        found = [self._read_image(split, number) for number in numbers]
        pixels, labels = (torch.stack(parts) for parts in zip(*found, strict=True))
        return {"tokens": pixels, "labels": labels[:, None], "loss_mask": torch.ones(len(labels), 1)}

    def _read_image(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        index = self._permuted_index(number) if split == TRAIN else number
        for file in self._splits[split]:
            if index < len(file):
                pixels = file.images[index : index + 1][0].float() / 255
                return (pixels - self._mean) / self._std, file.labels[index]
            index -= len(file)
        raise AssertionError(f"{split} has no image {number}")

    def _permuted_index(self, number: int) -> int:
        count = sum(map(len, self._splits[TRAIN]))
        turn, place = divmod(number, count)
        if turn not in self._permutations:
            digest = hashlib.sha256(f"{self._seed}:{turn}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            self._permutations[turn] = torch.randperm(count, generator=generator)
            while len(self._permutations) > CACHED_PERMUTATIONS:
                del self._permutations[next(iter(self._permutations))]
        return int(self._permutations[turn][place])


def open_image_dataset(data: DataSection, model_config: ModelConfig, held_out: int, first: int = 0) -> ImageDataset:
    """Opens what [data] names for a model of these sizes. Collective: any fault is raised on all ranks as one
    DataError."""
    return all_ranks().run_on_all(
        lambda: ImageDataset(_open_splits(data, model_config, held_out), model_config, data, first)
    )


def _open_splits(data: DataSection, model_config: ModelConfig, held_out: int) -> dict[str, list[ImageFile]]:
    errors = ErrorCollector("data", DataError)
    splits = {}
    for split, listed in ((TRAIN, data.train), (VALID, data.valid)):
        splits[split] = [
            file
            for entry in listed
            if (file := _open_image_file(entry, f"data.{split}", model_config, errors)) is not None
        ]
        if not listed and (split == TRAIN or held_out):
            errors.add(f"data.{split}", "files of images", "none", "Make them with prepare_images.")
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(data, name)
        if len(values) not in (1, model_config.num_channels):
            errors.add(
                f"data.{name}", f"one number, or one for each of {model_config.num_channels} channels", list(values)
            )
    errors.raise_if_any()
    return splits


def _open_image_file(
    entry: str | float, where: str, model_config: ModelConfig, errors: ErrorCollector
) -> ImageFile | None:
    """A file that holds images as the model sees them and labels that it knows; None, and a fault, for any other."""
    if not isinstance(entry, str):
        errors.add(where, "files only: images have no weights", entry)
        return None
    before = len(errors.problems)
    try:
        with safe_open(entry, "pt") as opened:
            names = set(opened.keys())
            for name in {IMAGES, LABELS} - names:
                errors.add(f"{entry}: {name}", "a tensor", "none")
            if names >= {IMAGES, LABELS}:
                _check_tensors(opened, entry, model_config, errors)
    except (OSError, SafetensorError) as error:
        errors.add(entry, "a safetensors file", error, "Make it with prepare_images.")
    return ImageFile(Path(entry)) if len(errors.problems) == before else None


def _check_tensors(opened: safe_open, where: str, model_config: ModelConfig, errors: ErrorCollector) -> None:
    images, labels = opened.get_slice(IMAGES), opened.get_slice(LABELS)
    count, *shape = images.get_shape() or [0]
    expected = [model_config.num_channels, model_config.image_size, model_config.image_size]
    if images.get_dtype() != "U8" or shape != expected:
        wanted = f"uint8, n x {' x '.join(map(str, expected))}, as the model sees them"
        found = f"{images.get_dtype()}, {' x '.join(map(str, images.get_shape()))}"
        errors.add(f"{where}: {IMAGES}", wanted, found)
    if labels.get_dtype() != "I64" or labels.get_shape() != [count] or not count:
        found = f"{labels.get_dtype()}, {' x '.join(map(str, labels.get_shape()))}"
        errors.add(f"{where}: {LABELS}", f"int64, one for each of {count} images (and at least one)", found)
        return
    told = opened.get_tensor(LABELS)
    least, most = int(told.min()), int(told.max())
    if least < 0 or most >= model_config.vocab_size:
        errors.add(f"{where}: {LABELS}", f"0 to {model_config.vocab_size - 1}, as the model has", f"{least} to {most}")
