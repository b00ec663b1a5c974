"""The batches of the next step are read while a step is taken."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

from megatron_ligo.common.errors import DataError
from megatron_ligo.config.run_config import FitSection
from megatron_ligo.data.sampler import ShardedSampler
from megatron_ligo.training.loop import _read_ahead


class Numbers(ShardedSampler):
    """Four steps of two samples; knows which samples have been read."""

    def __init__(self):
        super().__init__()
        self.read: list[int] = []
        self.was_read = {index: threading.Event() for index in range(8)}

    def _num_samples(self, split: str) -> int:
        return 8

    def _read_micro_batch(self, split: str, indices: range) -> dict:
        self.read += indices
        for index in indices:
            self.was_read[index].set()
        return {"tokens": torch.tensor(list(indices))}


def read(data: Numbers, steps: int, first_step: int):
    dims = SimpleNamespace(dp=1, dp_rank=0)
    return _read_ahead(data, FitSection(steps=steps, global_batch_size=2), dims, first_step)


def test_the_next_step_is_read_during_a_step():
    data = Numbers()
    for step, arguments, reading in read(data, 4, 1):
        assert [int(batch["tokens"]) for batch in reading.result(10)] == [2 * step, 2 * step + 1]
        assert arguments[0] == step
        if step < 3:
            # The step is being taken now.
            assert data.was_read[2 * step + 3].wait(10)
    assert data.read == [2, 3, 4, 5, 6, 7], "each sample once, in order, and none before or after the run's"


def test_a_missing_sample_is_an_error_of_its_own_step():
    steps = read(Numbers(), 5, 3)
    assert next(steps)[2].result(10)
    with pytest.raises(DataError):
        next(steps)[2].result(10)
    steps.close()
