"""Rotary positions of every kind of scaling in Megatron-core, equal to those of transformers.

Megatron-core's own classes know linear scaling, YaRN without a stated factor on cos and sin, and Llama 3's scaling with
one set of constants. Here the frequencies are computed by the formulas of transformers' `modeling_rope_utils`, and
handed to Megatron-core's class. Its attention reads the factor on cos and sin from the config.

Legend: d features of a head that rotate, d / 2 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ligo.arch import rope_scaling
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_scaling import ORIGINAL_LENGTH, scaling_kind
from megatron_ligo.distributed import device


class ScaledRotaryEmbedding(RotaryEmbedding):
    """forward(tokens of a sequence) -> angles (tokens, 1, 1, d), fp32."""

    def __init__(self, model_config: ModelConfig):
        super().__init__(
            kv_channels=model_config.head_dim,
            rotary_percent=model_config.rotary_fraction,
            rotary_interleaved=False,
            rotary_base=model_config.rope_base,
            use_cpu_initialization=device.is_cpu(),
        )
        self.model_config = model_config

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Returns the angle of each position and pair, (max_seq_len, d / 2), fp32."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        frequencies = rotary_frequencies(self.model_config, max_seq_len + offset)
        return torch.outer(positions, frequencies.to(positions.device))


def build_rotary_embedding(model_config: ModelConfig) -> RotaryEmbedding | None:
    """Builds the rotary embedding; None for learned positions."""
    return None if model_config.rope_base is None else ScaledRotaryEmbedding(model_config)


def set_attention_factor(config: TransformerConfig, model_config: ModelConfig) -> None:
    """Makes Megatron-core's attention multiply cos and sin by the scaling's factor.

    Its rule is YaRN's, 1 + 0.1 mscale log(scale). At scale e, this mscale gives any factor.
    """
    factor = rope_scaling.attention_factor(model_config.rope_scaling)
    if factor != 1:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10 * (factor - 1)
        config.yarn_mscale_all_dim = 0.0


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
