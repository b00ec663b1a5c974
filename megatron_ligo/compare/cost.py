"""What an arm costs before its first step, known before any of it is run."""

from __future__ import annotations

from megatron_ligo.arch.dims import Dims
from megatron_ligo.config import Config
from megatron_ligo.growth.check import initial_operator
from megatron_ligo.growth.cost import fit_step_flops


def fit_flops(config: Config, small: Dims, lagged: bool = False) -> float:
    """Of [fit], with as many steps as its max_flops pays for; what patience may end sooner is counted whole."""
    fit, operator = config.fit, initial_operator(small, config.large, config.operator)
    seq = operator.large.tokens_of_sample(config.data.seq_length)
    step = fit_step_flops(operator, fit.global_batch_size * seq, seq, fit.distill > 0, lagged or bool(fit.lag))
    return step * (fit.steps if fit.max_flops is None else min(fit.steps, int(fit.max_flops // step)))
