"""The frequencies of rotary positions under each kind of scaling, in the operations of transformers' formulas.

Legend: d features of a head that rotate, d / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import ORIGINAL_LENGTH, scaling_kind


def rotary_frequencies(model_config: ModelConfig, seq_length: int) -> Tensor:
    """Returns the angle of each pair at position 1 in a sequence of a length, (d / 2,), fp32."""
    rule = _FREQUENCIES.get(scaling_kind(model_config.rope_scaling))
    if rule is None:
        return 1.0 / _wavelengths(model_config.rope_base, model_config.num_rotated)
    return rule(model_config, model_config.rope_scaling, seq_length)


def _wavelengths(base: float, num_rotated: int) -> Tensor:
    """Returns base^(2 j / d) for each pair j, (d / 2,), fp32."""
    return base ** (torch.arange(0, num_rotated, 2, dtype=torch.float32) / num_rotated)


def _linear(model_config: ModelConfig, scaling: Mapping, seq_length: int) -> Tensor:
    return 1.0 / _wavelengths(model_config.rope_base, model_config.num_rotated) / scaling["factor"]


def _dynamic(model_config: ModelConfig, scaling: Mapping, seq_length: int) -> Tensor:
    factor, num_rotated = scaling["factor"], model_config.num_rotated
    length = max(seq_length, model_config.max_positions)
    growth = factor * length / model_config.max_positions - (factor - 1)
    base = model_config.rope_base * growth ** (num_rotated / (num_rotated - 2))
    return 1.0 / _wavelengths(base, num_rotated)


def _yarn(model_config: ModelConfig, scaling: Mapping, seq_length: int) -> Tensor:
    base, num_rotated = model_config.rope_base, model_config.num_rotated

    def find_pair(rotations: float) -> float:
        """Returns the index of the pair that rotates so often within the original length."""
        return num_rotated * math.log(scaling[ORIGINAL_LENGTH] / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = find_pair(scaling.get("beta_fast") or 32), find_pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, num_rotated - 1)
    if first == last:
        last += 0.001
    interpolated = torch.clamp((torch.arange(num_rotated // 2, dtype=torch.float32) - first) / (last - first), 0, 1)
    wavelengths = _wavelengths(base, num_rotated)
    kept = 1 - interpolated
    return 1.0 / (scaling["factor"] * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _llama3(model_config: ModelConfig, scaling: Mapping, seq_length: int) -> Tensor:
    factor, original = scaling["factor"], scaling[ORIGINAL_LENGTH]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = 1.0 / _wavelengths(model_config.rope_base, model_config.num_rotated)
    periods = 2 * math.pi / frequencies
    scaled = torch.where(periods > original / low, frequencies / factor, frequencies)
    smooth = (original / periods - low) / (high - low)
    between = ~(periods < original / high) * ~(periods > original / low)
    return torch.where(between, (1 - smooth) * scaled / factor + smooth * scaled, scaled)


def _longrope(model_config: ModelConfig, scaling: Mapping, seq_length: int) -> Tensor:
    divisors = scaling["long_factor" if seq_length > scaling[ORIGINAL_LENGTH] else "short_factor"]
    wavelengths = _wavelengths(model_config.rope_base, model_config.num_rotated)
    return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * wavelengths)


_FREQUENCIES: dict[str, Callable[[ModelConfig, Mapping, int], Tensor]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
