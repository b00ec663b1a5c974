"""BERT's layer: a norm after each sum (post-LN). Megatron-core has none: its own BERT normalises before each block."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class PostNormLayer(TransformerLayer):
    """x (s, b, hidden) -> norm2(y + mlp(y)) with y = norm1(x + attention(x)).

    A layer of our own on Megatron-core's attention, mlp and tensor-parallel linears. It is built from the same spec as
    the layers that normalise first, whose two norms then stand elsewhere and bear other names.
    """

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, layer_number: int):
        super().__init__(config, submodules, layer_number=layer_number)
        self.post_self_attn_layernorm = self._modules.pop("input_layernorm")
        self.post_mlp_layernorm = self._modules.pop("pre_mlp_layernorm")

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """(the layer's output, None), as mcore's layers give it. No mask: each token sees all."""
        y = self.post_self_attn_layernorm(x + with_bias(*self.self_attention(x, attention_mask=attention_mask)))
        return self.post_mlp_layernorm(y + with_bias(*self.mlp(y))), None


def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """mcore's linears give their biases apart."""
    return out if bias is None else out + bias
