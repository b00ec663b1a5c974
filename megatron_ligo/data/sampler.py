"""Which samples a rank reads at a step: that depends on the step and the layout alone, whatever the samples are.

Legend: b samples of a micro-batch, s tokens of a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import xxhash
from torch import Tensor

from megatron_ligo.common.errors import DataError, LayoutError, Problem

Batch = dict[str, Tensor]  # tokens (or images), labels, loss_mask
TRAIN, VALID = "train", "valid"


class ShardedSampler(ABC):
    """Training and held-out samples, dealt to the data-parallel ranks. first: where step 0 begins."""

    def __init__(self, first: int = 0):
        self._first = first

    @abstractmethod
    def _num_samples(self, split: str) -> int:
        """How many samples there are."""

    @abstractmethod
    def _read_micro_batch(self, split: str, numbers: range) -> Batch: ...

    def train_batch(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[Batch]:
        """A rank's micro-batches of global step `step` (from 0): G samples from `first` + step*G on, dealt in turn.

        Each is `tokens`, `labels` int64 [b, s] and `loss_mask` float32 [b, s]; labels are the tokens that follow, or
        those that were masked. Of images, `tokens` are the pixels, float32 [b, channels, side, side], and s is 1.
        """
        first = self._first + step * global_batch_size
        return self._read_local_batches(TRAIN, first, global_batch_size, micro_batch_size, dp, dp_rank)

    def train_sample_ranges(
        self, step: int, global_batch_size: int, micro_batch_size: int, dp: int, dp_rank: int
    ) -> list[range]:
        """The numbers of the samples in each of the micro-batches that `batch` gives."""
        first = self._first + step * global_batch_size
        return _list_micro_batches(first, global_batch_size, micro_batch_size, dp, dp_rank)

    def eval_batch(self, num_samples: int, micro_batch_size: int, dp: int, dp_rank: int) -> list[Batch]:
        """A rank's micro-batches of the first `num_samples` held-out samples, in `batch`'s form."""
        return self._read_local_batches(VALID, 0, num_samples, micro_batch_size, dp, dp_rank)

    def eval_digest(self, num_samples: int) -> str:
        """xxh3-64 (hex) of the tokens and labels of the first held-out samples: the same for every layout."""
        (batch,) = self.eval_batch(num_samples, num_samples, 1, 0)
        return xxhash.xxh3_64(b"".join(batch[name].numpy().tobytes() for name in ("tokens", "labels"))).hexdigest()

    def _read_local_batches(self, split: str, first: int, size: int, micro: int, dp: int, dp_rank: int) -> list[Batch]:
        if size % (micro * dp):
            what = f"{split} batch of {size} samples"
            hint = "Change the batch size, micro_batch_size or the number of processes."
            raise LayoutError(Problem(what, f"a multiple of micro_batch_size x dp = {micro} x {dp}", size, hint))
        if first + size > self._num_samples(split):
            hint = "Open the data for that many."
            raise DataError(Problem(f"{split} samples", f"at least {first + size}", self._num_samples(split), hint))
        return [
            self._read_micro_batch(split, numbers) for numbers in _list_micro_batches(first, size, micro, dp, dp_rank)
        ]


def _list_micro_batches(first: int, size: int, micro: int, dp: int, dp_rank: int) -> list[range]:
    return [range(start, start + micro) for start in range(first + dp_rank * micro, first + size, micro * dp)]
