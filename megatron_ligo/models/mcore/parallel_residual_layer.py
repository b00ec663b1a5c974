"""Layers whose attention and feed-forward read the same input in parallel. Megatron-core has none."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ligo.models.mcore.post_norm_layer import add_bias


class ParallelResidualLayer(TransformerLayer):
    """x (s, b, hidden) -> x + attention(norm1(x)) + mlp(norm2(x)), with Megatron-core's modules and names."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """x (s, b, hidden) -> (output (s, b, hidden), None), as in mcore's layers."""
        normalised = self.input_layernorm(x)
        attended = self.self_attention(normalised, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        return x + add_bias(*attended) + add_bias(*self.mlp(self.normalise_for_mlp(x, normalised))), None

    def normalise_for_mlp(self, x: Tensor, normalised: Tensor) -> Tensor:
        """Returns what the MLP reads, of the layer's input x and of what attention reads, all (s, b, hidden)."""
        return self.pre_mlp_layernorm(x)


class SharedNormLayer(ParallelResidualLayer):
    """x (s, b, hidden) -> x + attention(norm(x)) + mlp(norm(x)): one norm for both."""

    def normalise_for_mlp(self, x: Tensor, normalised: Tensor) -> Tensor:
        """Returns what attention reads, (s, b, hidden)."""
        return normalised
