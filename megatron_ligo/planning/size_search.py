"""Chooses sizes of a large model: close to a number of parameters, growable from the small one, divisible by tp."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.config.run_config import LargeSection
from megatron_ligo.growth.methods import can_be_lossless
from megatron_ligo.growth.validation import derive_large_config
from megatron_ligo.planning.parameter_count import count_model

MAX_TIMES = 4  # of the small model's layers, and of its heads
FFN_MULTIPLE = 64
# Of two sizes that miss the number equally, the one whose depth and width grow alike is preferred.
UNEVEN_COST = 0.1
CLOSE_ENOUGH = 0.25


def choose_sizes(small: ModelConfig, parameters: float, tp: int = 1) -> LargeSection:
    """Returns sizes of about this many parameters. Heads keep their size and their ratio to KV heads.

    Whole multiples of the width, where the norms need them for a lossless start, come first. tp: divides the heads, KV
    heads and ffn. Raises ConfigError if no such sizes come within a quarter of the number.
    """
    candidates = sorted(_candidates(small, tp), key=lambda section: _cost(small, section, parameters))
    lossless = [section for section in candidates if can_be_lossless(small, derive_large_config(small, section))]
    best = next(
        (ranked[0] for ranked in (lossless, candidates) if ranked and _is_close(small, ranked[0], parameters)), None
    )
    if best is None:
        count = count_model(derive_large_config(small, candidates[0])) if candidates else 0
        closest = f"{count:.3g} at the closest" if candidates else f"none that tp = {tp} divides"
        own = count_model(small)
        hint = f"The small model has {own:.3g}; growth never shrinks. Choose another --to, or grow in stages."
        raise ConfigError(Problem("--to", f"sizes of {parameters:.3g} parameters", closest, hint))
    return best


def _candidates(small: ModelConfig, tp: int) -> Iterator[LargeSection]:
    ratio = small.num_heads // small.num_kv_heads
    groups = "num_kv_heads" in architectures.get(small.arch).hf_fields.values()
    for kv_heads in range(small.num_kv_heads, MAX_TIMES * small.num_kv_heads + 1):
        hidden = small.hidden_size * kv_heads // small.num_kv_heads
        ffn = round(small.ffn_size * hidden / small.hidden_size / FFN_MULTIPLE) * FFN_MULTIPLE
        if hidden % (kv_heads * ratio) or kv_heads % tp or ffn % tp or ffn < small.ffn_size:
            continue
        for layers in range(small.num_layers, MAX_TIMES * small.num_layers + 1):
            yield LargeSection(
                num_layers=layers,
                hidden_size=hidden,
                ffn_size=ffn,
                num_heads=kv_heads * ratio,
                num_kv_heads=kv_heads if groups else None,
            )


def _is_close(small: ModelConfig, section: LargeSection, parameters: float) -> bool:
    return abs(count_model(derive_large_config(small, section)) / parameters - 1) <= CLOSE_ENOUGH


def _cost(small: ModelConfig, section: LargeSection, parameters: float) -> float:
    miss = math.log(count_model(derive_large_config(small, section)) / parameters)
    uneven = math.log(section.num_layers / small.num_layers) - math.log(section.hidden_size / small.hidden_size)
    return abs(miss) + UNEVEN_COST * abs(uneven)
