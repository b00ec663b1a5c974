"""Patterns of layers (windows, no rotary positions) as Megatron-core's config and Megatron-LM's arguments have them."""

from __future__ import annotations

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig


def to_layer_patterns(model_config: ModelConfig) -> dict[str, object]:
    """Returns `window_size` (tokens before and after each token), `window_attn_skip_freq` and `no_rope_freq`.

    The frequencies are lists with 1 for each layer that has the window, or no rotary positions. None for no pattern.
    """
    window, rotates = model_config.sliding_window, model_config.rope_layers
    is_causal = architectures.get(model_config.arch).is_causal
    return {
        "window_size": None if window is None else (window - 1, 0 if is_causal else window - 1),
        "window_attn_skip_freq": model_config.window_layers and [int(flag) for flag in model_config.window_layers],
        "no_rope_freq": rotates and [int(not flag) for flag in rotates],
    }


def skipped_layers(frequency: object, num_layers: int) -> tuple[bool, ...] | None:
    """Returns which layers a stated frequency marks: a list with a flag for each layer, or n for every n-th layer.

    None for any other value.
    """
    if isinstance(frequency, int) and not isinstance(frequency, bool) and frequency > 0:
        return tuple((layer + 1) % frequency == 0 for layer in range(num_layers))
    is_list = isinstance(frequency, list | tuple) and len(frequency) == num_layers
    return tuple(bool(flag) for flag in frequency) if is_list and all(flag in (0, 1) for flag in frequency) else None
