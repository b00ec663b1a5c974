"""Assigns samples to data-parallel ranks, as a function of the step and the layout alone.

Legend: b samples of a micro-batch, s tokens of a sample.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import xxhash
from torch import Tensor

from megatron_ligo.common.errors import DataError, LayoutError, Problem

Batch = dict[str, Tensor]  # tokens (or images), labels, loss_mask
TRAIN, VALID = "train", "valid"
# Held-out samples that are in memory at once while their digest is computed.
DIGEST_SAMPLES = 16


class ShardedSampler(ABC):
    """Training and held-out samples, sharded over the data-parallel ranks.

    first_sample: index of the first training sample of step 0.
    """

    # Split -> folder and digest of the files that hold the order of its samples.
    index_digests: Mapping[str, tuple[Path, str]] = {}

    def __init__(self, first_sample: int = 0):
        self._first_sample = first_sample

    @abstractmethod
    def _num_samples(self, split: str) -> int:
        """Returns the number of samples of a split."""

    @abstractmethod
    def _read_micro_batch(self, split: str, indices: range) -> Batch: ...

    def train_batch(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[Batch]:
        """Reads this rank's micro-batches of a step; micro-batches are dealt to the ranks round-robin.

        Returns `tokens`, `labels`: int64 [b, s] and `loss_mask`: float32 [b, s] for each. Labels are the next tokens,
        or the tokens before masking. For images, `tokens` is float32 [b, channels, side, side] and s is 1.
        Raises LayoutError if the batch does not divide evenly, DataError if the split is too short.
        """
        start = self._first_sample + step * global_batch_size
        return self._read_local_batches(TRAIN, start, global_batch_size, micro_batch_size, dp, dp_rank)

    def train_sample_ranges(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[range]:
        """Returns the sample indices of each micro-batch that `train_batch` reads."""
        start = self._first_sample + step * global_batch_size
        return _list_micro_batches(start, global_batch_size, micro_batch_size, dp, dp_rank)

    def eval_parts(
        self, num_samples: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[tuple[int, list[Batch]]]:
        """Reads the first `num_samples` held-out samples at any dp, in one or two parts, shaped as in `train_batch`.

        A part is its number of samples over all ranks and this rank's micro-batches. What does not divide evenly is
        the second part, which every rank reads whole. Micro-batches are smaller if the samples need it.
        """
        size = math.gcd(num_samples, micro_batch_size)
        shared = num_samples - num_samples % (size * dp)
        self._check_length(VALID, num_samples)
        parts = []
        if shared:
            parts.append((shared, self._read_local_batches(VALID, 0, shared, size, dp, dp_rank)))
        if shared < num_samples:
            rest = range(shared, num_samples, size)
            parts.append(
                (num_samples - shared, [self._read_micro_batch(VALID, range(first, first + size)) for first in rest])
            )
        return parts

    def eval_digest(self, num_samples: int) -> str:
        """Returns the xxh3-64 (hex) of the tokens and labels of the first held-out samples; equal at every layout."""
        state, labels = xxhash.xxh3_64(), []
        for first in range(0, num_samples, DIGEST_SAMPLES):
            batch = self.held_out_batch(range(first, min(first + DIGEST_SAMPLES, num_samples)))
            state.update(batch["tokens"].numpy().tobytes())
            labels.append(batch["labels"].numpy().tobytes())
        state.update(b"".join(labels))
        return state.hexdigest()

    def held_out_batch(self, indices: range) -> Batch:
        """Reads these held-out samples, shaped as in `train_batch`."""
        self._check_length(VALID, indices.stop)
        return self._read_micro_batch(VALID, indices)

    def _read_local_batches(
        self, split: str, start: int, size: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[Batch]:
        if size % (micro_batch_size * dp):
            expected = f"a multiple of micro_batch_size x dp = {micro_batch_size} x {dp}"
            hint = "Change global_batch_size, micro_batch_size or the number of processes."
            raise LayoutError(Problem(f"{split} batch", expected, size, hint))
        self._check_length(split, start + size)
        micro_batches = _list_micro_batches(start, size, micro_batch_size, dp, dp_rank)
        return [self._read_micro_batch(split, indices) for indices in micro_batches]

    def _check_length(self, split: str, needed: int) -> None:
        if needed > self._num_samples(split):
            hint = "Open the dataset with enough samples."
            raise DataError(Problem(f"{split} samples", f"at least {needed}", self._num_samples(split), hint))


def _list_micro_batches(start: int, size: int, micro_batch_size: int, dp: int, dp_rank: int) -> list[range]:
    """Returns the sample indices of each micro-batch of a rank, for a global batch of `size` samples from `start`."""
    firsts = range(start + dp_rank * micro_batch_size, start + size, micro_batch_size * dp)
    return [range(first, first + micro_batch_size) for first in firsts]
