"""Labelled images in safetensors files: `images`, uint8 (n, channels, side, side), and `labels`, int64 (n,).

Each epoch over the training images has its own permutation, which depends on the seed and the epoch alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import DataError, ErrorCollector
from megatron_ligo.common.seeding import seeded_generator
from megatron_ligo.config.run_config import DataSection
from megatron_ligo.data.sampler import TRAIN, VALID, Batch, ShardedSampler
from megatron_ligo.distributed.mesh import all_ranks

IMAGES, LABELS = "images", "labels"
CACHED_PERMUTATIONS = 2


class ImageFile:
    """One image file: all labels in memory, images read one at a time."""

    def __init__(self, path: Path):
        with safe_open(path, "pt") as tensors:
            self.labels = tensors.get_tensor(LABELS)
            self.images = tensors.get_slice(IMAGES)
        self.path = path

    def __len__(self) -> int:
        return len(self.labels)


class ImageDataset(ShardedSampler):
    """Samples of the concatenated files of each split. Built by `open_image_dataset`."""

    def __init__(
        self,
        files: dict[str, list[ImageFile]],
        model_config: ModelConfig,
        section: DataSection,
        first_sample: int = 0,
    ):
        super().__init__(first_sample)
        self._files = files
        self._seed = section.seed
        self._permutations: dict[int, Tensor] = {}
        channels = model_config.num_channels
        self._mean, self._std = (
            torch.tensor(values).expand(channels)[:, None, None] for values in (section.pixel_mean, section.pixel_std)
        )

    def _num_samples(self, split: str) -> int:
        # The training images repeat.
        return sys.maxsize if split == TRAIN else sum(map(len, self._files[VALID]))

    def _read_micro_batch(self, split: str, indices: range) -> Batch:
        samples = [self._read_sample(split, index) for index in indices]
        pixels, labels = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
        return {"tokens": pixels, "labels": labels[:, None], "loss_mask": torch.ones(len(labels), 1)}

    def _read_sample(self, split: str, sample_index: int) -> tuple[Tensor, Tensor]:
        """Returns the normalised pixels, float32 [channels, side, side], and the label, int64 []."""
        index = self._permute(sample_index) if split == TRAIN else sample_index
        for file in self._files[split]:
            if index < len(file):
                pixels = file.images[index : index + 1][0].float() / 255
                return (pixels - self._mean) / self._std, file.labels[index]
            index -= len(file)
        raise AssertionError(f"{split} has no image {sample_index}")

    def _permute(self, sample_index: int) -> int:
        """Maps a training sample's index to the index of its image in the concatenated files."""
        count = sum(map(len, self._files[TRAIN]))
        epoch, position = divmod(sample_index, count)
        if epoch not in self._permutations:
            self._permutations[epoch] = torch.randperm(count, generator=seeded_generator(self._seed, epoch))
            while len(self._permutations) > CACHED_PERMUTATIONS:
                del self._permutations[next(iter(self._permutations))]
        return int(self._permutations[epoch][position])


def open_image_dataset(
    section: DataSection, model_config: ModelConfig, num_valid: int, first_sample: int = 0
) -> ImageDataset:
    """Opens the image files of [data] for a model. Collective: any problem raises one DataError on all ranks.

    num_valid: held-out samples that the run reads; 0: data.valid may be empty.
    """
    return all_ranks().run_on_all(
        lambda: ImageDataset(_open_splits(section, model_config, num_valid), model_config, section, first_sample)
    )


def _open_splits(section: DataSection, model_config: ModelConfig, num_valid: int) -> dict[str, list[ImageFile]]:
    errors = ErrorCollector("data", DataError)
    splits = {}
    for split, paths in ((TRAIN, section.train), (VALID, section.valid)):
        files = [_open_image_file(path, f"data.{split}", model_config, errors) for path in paths]
        splits[split] = [file for file in files if file is not None]
        if not paths and (split == TRAIN or num_valid):
            errors.add(f"data.{split}", "image files", "none", "Create them with `ligo prepare-images`.")
    for key in ("pixel_mean", "pixel_std"):
        values = getattr(section, key)
        if len(values) not in (1, model_config.num_channels):
            errors.add(f"data.{key}", f"one number, or one per channel ({model_config.num_channels})", list(values))
    errors.raise_if_any()
    return splits


def _open_image_file(
    path: str | float, key: str, model_config: ModelConfig, errors: ErrorCollector
) -> ImageFile | None:
    """Opens a file; if its images or labels do not fit the model, adds errors and returns None."""
    if not isinstance(path, str):
        errors.add(key, "file paths only (images have no weights)", path)
        return None
    count = len(errors.problems)
    if not Path(path).is_file():
        # Opening a pipe would block.
        actual = "something else" if Path(path).exists() else "nothing"
        errors.add(path, "a safetensors file", actual, "Create it with tools/prepare_images.py.")
        return None
    try:
        with safe_open(path, "pt") as tensors:
            names = set(tensors.keys())
            for name in {IMAGES, LABELS} - names:
                errors.add(f"{path}: {name}", "a tensor", "none")
            if names >= {IMAGES, LABELS}:
                _check_tensors(tensors, path, model_config, errors)
    except (OSError, SafetensorError) as error:
        errors.add(path, "a safetensors file", error, "Create it with `ligo prepare-images`.")
    return ImageFile(Path(path)) if len(errors.problems) == count else None


def _check_tensors(tensors: safe_open, path: str, model_config: ModelConfig, errors: ErrorCollector) -> None:
    images, labels = tensors.get_slice(IMAGES), tensors.get_slice(LABELS)
    count, *shape = images.get_shape() or [0]
    expected_shape = [model_config.num_channels, model_config.image_size, model_config.image_size]
    if images.get_dtype() != "U8" or shape != expected_shape:
        expected = f"uint8, n x {' x '.join(map(str, expected_shape))} (the model's input)"
        found = f"{images.get_dtype()}, {' x '.join(map(str, images.get_shape()))}"
        errors.add(f"{path}: {IMAGES}", expected, found)
    if labels.get_dtype() != "I64" or labels.get_shape() != [count] or not count:
        found = f"{labels.get_dtype()}, {' x '.join(map(str, labels.get_shape()))}"
        errors.add(f"{path}: {LABELS}", f"int64, one per image ({count}; at least 1)", found)
        return
    values = tensors.get_tensor(LABELS)
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0 or largest >= model_config.vocab_size:
        expected = f"0 to {model_config.vocab_size - 1} (the model's labels)"
        errors.add(f"{path}: {LABELS}", expected, f"{smallest} to {largest}")
