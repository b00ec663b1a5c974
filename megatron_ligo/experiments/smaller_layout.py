"""A layout for a model that the configured one, chosen for a larger model, does not fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import ParallelSection, RunConfig
from megatron_ligo.training.initial_weights import check_layout


def with_smaller_layout(config: RunConfig, small: ModelConfig) -> RunConfig:
    """Returns the config with a layout that the small model fits: [pretrain.parallel] itself if it does.

    Otherwise tp, cp, pp and ep are divisors of those, with as many ranks as the small model allows; data parallelism
    takes the rest, and micro-batches shrink as it grows, so that a step has the same samples. The loss does not depend
    on the layout. Raises ConfigError, that of the layout as it is, if no smaller one fits.
    """
    run = config.pretrain
    length = small.tokens_per_sample(config.data.seq_length)
    try:
        check_layout(small, run.parallel, length)
    except ConfigError as error:
        parallel = next((each for each in _smaller_layouts(run.parallel) if _fits(small, each, length)), None)
        if parallel is None:
            raise error
        factor = _ranks(run.parallel) // _ranks(parallel)
        micro_batch_size = 1 if run.micro_batch_size % factor else run.micro_batch_size // factor
        return replace(config, pretrain=replace(run, parallel=parallel, micro_batch_size=micro_batch_size))
    return config


def _smaller_layouts(parallel: ParallelSection) -> list[ParallelSection]:
    """Returns every layout of divisors of tp, cp, pp and ep: that of most ranks, then of the largest tp, first."""
    sizes = itertools.product(*map(_divisors, (parallel.tp, parallel.cp, parallel.pp, parallel.ep)))
    layouts = [
        replace(parallel, tp=tp, cp=cp, pp=pp, ep=ep, sequence_parallel=parallel.sequence_parallel and tp > 1)
        for tp, cp, pp, ep in sizes
    ]
    return sorted(layouts, key=lambda each: (_ranks(each), each.tp, each.cp, each.pp, each.ep), reverse=True)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def _ranks(parallel: ParallelSection) -> int:
    return parallel.tp * parallel.cp * parallel.pp


def _fits(small: ModelConfig, parallel: ParallelSection, seq_length: int) -> bool:
    try:
        check_layout(small, parallel, seq_length)
    except ConfigError:
        return False
    return True
