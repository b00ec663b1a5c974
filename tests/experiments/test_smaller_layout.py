"""A layout for the small model where the configured one was chosen for the large model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import ParallelSection, PretrainSection, RunConfig
from megatron_ligo.experiments.smaller_layout import with_smaller_layout
from tests.tiny_models import llama_config

SMALL = llama_config(num_layers=2, hidden_size=48, ffn_size=96, num_heads=6, num_kv_heads=3)


def small_run(micro_batch_size: int = 8, seq_length: int = 16, **layout) -> PretrainSection:
    run = PretrainSection(global_batch_size=8, micro_batch_size=micro_batch_size, parallel=ParallelSection(**layout))
    config = RunConfig()
    config = replace(config, pretrain=run, data=replace(config.data, seq_length=seq_length))
    return with_smaller_layout(config, SMALL).pretrain


def test_a_layout_that_fits_stays():
    for layout in ({"tp": 3, "pp": 2, "sequence_parallel": True}, {"tp": 1, "zero": 3}):
        run = small_run(seq_length=48, **layout)
        assert run.parallel == ParallelSection(**layout) and run.micro_batch_size == 8


@pytest.mark.parametrize(
    ("layout", "expected", "micro_batch_size"),
    [
        ({"tp": 2}, {"tp": 1}, 4),
        ({"tp": 2, "sequence_parallel": True, "zero": 2}, {"tp": 1, "zero": 2}, 4),
        ({"tp": 6, "pp": 2}, {"tp": 3, "pp": 2}, 4),
        ({"tp": 1, "pp": 4}, {"tp": 1, "pp": 2}, 4),
        ({"tp": 4, "cp": 3}, {"tp": 1, "cp": 3}, 2),
        # The large model has experts, the small one has none.
        ({"tp": 3, "ep": 2, "sequence_parallel": True}, {"tp": 3, "sequence_parallel": True}, 8),
    ],
)
def test_a_layout_that_does_not_is_the_largest_that_does(layout, expected, micro_batch_size):
    """Data parallelism takes the rest: the micro-batches of all its ranks are the samples that one had."""
    run = small_run(seq_length=48, **layout)
    assert run.parallel == ParallelSection(**expected) and run.micro_batch_size == micro_batch_size


def test_micro_batches_that_cannot_be_divided_are_of_one_sample():
    assert small_run(micro_batch_size=1, tp=2).micro_batch_size == 1


def test_what_no_layout_mends_is_refused():
    with pytest.raises(ConfigError, match=r"data\.seq_length"):
        small_run(seq_length=100_000, tp=2)
