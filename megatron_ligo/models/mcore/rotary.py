"""Rotary positions of every kind of scaling in Megatron-core, equal to those of transformers.

Megatron-core's own classes know linear scaling, YaRN without a stated factor on cos and sin, and Llama 3's scaling with
one set of constants. Here its class is given the frequencies of arch/rope_frequencies.py. Its attention reads the
factor on cos and sin from the config.

Legend: d features of a head that rotate, d / 2 pairs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch import rope_scaling
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_frequencies import rotary_frequencies
from megatron_ligo.distributed import device
from megatron_ligo.distributed.mesh import context_place
from megatron_ligo.models.mcore.attention import QueryScaling

CACHED_FACTOR = "_yarn_concentration_factor"


class ScaledRotaryEmbedding(RotaryEmbedding):
    """forward(tokens of a sequence on this rank) -> their angles (tokens, 1, 1, d), fp32."""

    def __init__(self, model_config: ModelConfig):
        super().__init__(
            kv_channels=model_config.head_dim,
            rotary_percent=model_config.rotary_fraction,
            rotary_interleaved=False,
            rotary_base=model_config.rope_base,
            use_cpu_initialization=device.is_cpu(),
        )
        self.model_config = model_config
        # Megatron-core would give each context-parallel rank two parts of the sequence, from both ends.
        self.cp_group = None
        self.cp_rank, self.cp = context_place()

    def forward(self, num_tokens: int) -> Tensor:
        return super().forward(num_tokens * self.cp).chunk(self.cp)[self.cp_rank]

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Returns the angle of each position and pair, (max_seq_len, d / 2), fp32."""
        positions = torch.arange(max_seq_len, device=self.inv_freq.device, dtype=torch.float32) + offset
        frequencies = rotary_frequencies(self.model_config, max_seq_len + offset)
        return torch.outer(positions, frequencies.to(positions.device))


class LayerRotaryEmbedding(nn.Module):
    """forward(tokens of a sequence on this rank, layer) -> their angles (tokens, 1, 1, d), fp32, or None."""

    def __init__(self, model_config: ModelConfig):
        super().__init__()
        self.kinds = [model_config.layer_kind(layer) for layer in range(model_config.num_layers)]
        self.common = ScaledRotaryEmbedding(model_config)
        self.window = None
        if model_config.has_window_positions:
            self.window = ScaledRotaryEmbedding(model_config.with_window_positions())

    def forward(self, num_tokens: int, layer: int) -> Tensor | None:
        kind = self.kinds[layer]
        embedding = self.window if kind.has_window_positions else self.common
        return embedding(num_tokens) if kind.rotates else None


def build_rotary_embedding(model_config: ModelConfig) -> LayerRotaryEmbedding | None:
    """Builds the rotary embedding; None for learned positions."""
    return None if model_config.rope_base is None else LayerRotaryEmbedding(model_config)


def unscale_window_positions(layers: Iterable[TransformerLayer], model_config: ModelConfig) -> None:
    """Takes the factor on cos and sin from the layers of a model that have the window's own positions."""
    if not model_config.has_window_positions or rope_scaling.attention_factor(model_config.rope_scaling) == 1:
        return
    for layer in layers:
        if model_config.layer_kind(layer.layer_number - 1).has_window_positions:
            attention = layer.self_attention
            attention.config = copy.copy(attention.config)
            attention.config.yarn_mscale = 0.0
            # Megatron-core 0.19 keeps the factor from construction.
            if hasattr(attention, CACHED_FACTOR):
                setattr(attention, CACHED_FACTOR, 1.0)


def get_query_scaling(model_config: ModelConfig) -> QueryScaling | None:
    """Returns the factor of queries by their position; None for no factor."""
    beta, length = model_config.query_scaling_beta, model_config.query_scaling_length
    if not beta:
        return None
    if length is None:
        length = model_config.rope_scaling[rope_scaling.ORIGINAL_LENGTH]
    if architectures.get(model_config.arch).scales_unrotated_queries:
        return QueryScaling(beta, length, first=1, unrotated_only=True)
    return QueryScaling(beta, length)


def set_attention_factor(config: TransformerConfig, model_config: ModelConfig) -> None:
    """Makes Megatron-core's attention multiply cos and sin by the scaling's factor.

    Its rule is YaRN's, 1 + 0.1 mscale log(scale). At scale e, this mscale gives any factor.
    """
    factor = rope_scaling.attention_factor(model_config.rope_scaling)
    if factor != 1:
        config.yarn_rotary_scaling_factor = math.e
        config.yarn_mscale = 10 * (factor - 1)
        config.yarn_mscale_all_dim = 0.0
