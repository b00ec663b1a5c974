"""GPT-NeoX's layer: attention and feed-forward read one input side by side. Megatron-core has none of the kind."""

from __future__ import annotations

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ligo.models.mcore.post_norm_layer import with_bias


class ParallelResidualLayer(TransformerLayer):
    """x (s, b, hidden) -> x + attention(norm1(x)) + mlp(norm2(x)), on Megatron-core's modules under their own names."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """(the layer's output, None), as mcore's layers give it."""
        read = self.input_layernorm(x)
        attended = self.self_attention(read, attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb)
        return x + with_bias(*attended) + with_bias(*self.mlp(self.pre_mlp_layernorm(x))), None
