"""Reads what a GGUF file says of single layers, and the factor of the scores, where llama.cpp has rules of its own."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.checkpoint.formats.gguf.metadata_keys import ATTENTION_SCALE, WINDOW_BASE, WINDOW_PATTERN
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import ErrorCollector

FP32_ROUNDING = 2**-23


def complete_layers(
    metadata: Mapping[str, object], arch: Architecture, family: str, sizes: dict[str, object], errors: ErrorCollector
) -> None:
    """Sets which layers have a window or rotary positions, and the base of those of layers with a window."""
    network, num_layers = arch.gguf_network, sizes["num_layers"]
    if network.rope_period:
        sizes["rope_layers"] = _all_but(network.rope_period, num_layers)
    if not network.window_period:
        return
    pattern = metadata.get(f"{family}.{WINDOW_PATTERN}", network.window_period)
    layers = _window_layers(pattern, num_layers)
    if layers is None:
        expected = f"a period, or true or false for each of {num_layers} layers"
        errors.add(f"{family}.{WINDOW_PATTERN}", expected, describe_value(pattern))
        return
    sizes["window_layers"] = layers
    if arch.rotates_in_windows_only:
        sizes["rope_layers"] = layers
    base = sizes["rope_base"]
    if network.window_rope_base:
        sizes.setdefault("window_rope_base", network.window_rope_base)
        return
    stated = metadata.get(f"{family}.{WINDOW_BASE}", base)
    if not isinstance(stated, float) or not isclose(stated, base, rel_tol=FP32_ROUNDING):
        errors.add(f"{family}.{WINDOW_BASE}", f"{base:g}, the base of the other layers", describe_value(stated))
    if arch.hf_rope_by_layer_type:
        sizes["window_rope_base"] = base


def _window_layers(pattern: object, num_layers: int) -> tuple[bool, ...] | None:
    """Returns which layers have the window; None if the pattern is neither a period nor a list of flags."""
    if type(pattern) is int and pattern >= 0:
        return _all_but(pattern, num_layers)
    is_list = isinstance(pattern, list) and len(pattern) == num_layers
    if not is_list or any(flag not in (0, 1) or isinstance(flag, float) for flag in pattern):
        return None
    return tuple(map(bool, pattern))


def _all_but(period: int, num_layers: int) -> tuple[bool, ...]:
    """Returns False for each layer whose number (from 1) is a multiple of the period; True for all if it is 0."""
    return tuple(period == 0 or (layer + 1) % period != 0 for layer in range(num_layers))


def complete_attention_scale(
    metadata: Mapping[str, object], arch: Architecture, family: str, sizes: dict[str, object], errors: ErrorCollector
) -> None:
    """Sets the head size that scales the scores, and checks that a stated factor is what follows from it."""
    if "attention_scale" in sizes:
        return
    dim = sizes["head_dim"]
    if "attention_scale_dim" in arch.hf_fields.values():
        is_wide = sizes["num_layers"] == arch.gguf_network.wide_scale_layers
        dim = sizes["attention_scale_dim"] = sizes["hidden_size"] // sizes["num_heads"] if is_wide else dim
    scale, default = metadata.get(f"{family}.{ATTENTION_SCALE}", 0), dim**-0.5
    is_default = type(scale) in (int, float) and (scale == 0 or isclose(scale, default, rel_tol=FP32_ROUNDING))
    if not is_default:
        expected = f"0, or {default:.8g}, the root of 1 / the head size"
        errors.add(f"{family}.{ATTENTION_SCALE}", expected, describe_value(scale))
