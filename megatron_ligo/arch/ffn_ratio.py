"""The feed-forward size of families whose config states it as a whole multiple of hidden_size (`mlp_ratio`).

A block with a gate has two thirds of the multiple, rounded up to a multiple of 8.
"""

from __future__ import annotations

from megatron_ligo.arch.model_config import ModelConfig


def ffn_size_of(hidden_size: int, ratio: int, has_gate: bool) -> int:
    """Returns the feed-forward size that a ratio states."""
    size = hidden_size * ratio
    return (int(size * 2 / 3) + 7) // 8 * 8 if has_gate else size


def ffn_ratio_of(model_config: ModelConfig) -> int | None:
    """Returns the least ratio that states a model's feed-forward size; None if there is none."""
    hidden, has_gate = model_config.hidden_size, model_config.has_gate
    ratios = range(1, 2 * model_config.ffn_size // hidden + 2)
    return next((ratio for ratio in ratios if ffn_size_of(hidden, ratio, has_gate) == model_config.ffn_size), None)
