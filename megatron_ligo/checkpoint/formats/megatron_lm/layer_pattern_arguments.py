"""Megatron-LM's run arguments for the layers that have a window, and for those without rotary positions."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_ligo.arch.mcore_layer_patterns import skipped_layers
from megatron_ligo.common.errors import ErrorCollector

# Left and right of a window without limits.
UNLIMITED_WINDOWS = ((-1, -1), (-1, 0))
FLAGS = "a divisor of the number of layers, or a 0 or 1 for each layer"


def parse_patterns(
    values: Mapping[str, object], num_layers: object, is_causal: bool, errors: ErrorCollector
) -> dict[str, object]:
    """Returns the fields of ModelConfig that arguments state. Adds an error for a pattern that is none.

    is_causal: the family's tokens attend to no later ones. A run whose arguments do not state a pattern had none: its
    version of Megatron-LM may not have known it.
    """
    if type(num_layers) is not int or num_layers < 1:
        return {}
    window = _parse_window(values, is_causal, errors)
    layers = _parse_window_layers(values, num_layers, errors) if window else None
    if layers is not None and not any(layers):
        window = layers = None
    rope_layers = _parse_rope_layers(values.get("no_rope_freq"), num_layers, errors)
    return {"sliding_window": window, "window_layers": layers, "rope_layers": rope_layers}


def _parse_window(values: Mapping[str, object], is_causal: bool, errors: ErrorCollector) -> int | None:
    """Returns the attention window in tokens that arguments state, None if there is none."""
    window = values.get("window_size")
    if not window:
        return None
    if not isinstance(window, list | tuple) or len(window) != 2 or any(type(side) is not int for side in window):
        errors.add("window_size", "none, or two numbers of tokens", repr(window))
        return None
    left, right = window
    is_unlimited = (left, right) in UNLIMITED_WINDOWS
    if is_unlimited and values.get("transformer_impl") != "local":
        return None
    if is_unlimited or left < 0 or right != (0 if is_causal else left):
        hint = "Local layers of Megatron-core mask every token under -1." if is_unlimited else ""
        errors.add("window_size", f"none, or (tokens before, {0 if is_causal else 'as many'})", repr(window), hint)
        return None
    return left + 1


def _parse_window_layers(values: Mapping[str, object], num_layers: int, errors: ErrorCollector) -> tuple | None:
    """Returns which layers have the window; None for all. A number n leaves out every n-th layer."""
    skip = values.get("window_attn_skip_freq")
    if skip is None:
        return None
    layers = skipped_layers(skip, num_layers)
    if layers is None:
        errors.add("window_attn_skip_freq", FLAGS, repr(skip))
        return None
    layers = tuple(not flag for flag in layers) if isinstance(skip, int) else layers
    return None if all(layers) else layers


def _parse_rope_layers(skip: object, num_layers: int, errors: ErrorCollector) -> tuple | None:
    """Returns which layers have rotary positions; None for all. A number n leaves out every n-th layer."""
    if not skip:
        return None
    layers = skipped_layers(skip, num_layers)
    if layers is None or (isinstance(skip, int) and num_layers % skip):
        errors.add("no_rope_freq", FLAGS, repr(skip))
        return None
    return tuple(not flag for flag in layers) if any(layers) else None
