"""BERT's layer: a norm after each residual sum (post-LN). Megatron-core's own BERT normalises before each block."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class PostNormLayer(TransformerLayer):
    """x (s, b, hidden) -> norm2(y + mlp(y)) with y = norm1(x + attention(x)).

    It consists of Megatron-core's attention, MLP and tensor-parallel linears. It is built from the spec of a pre-norm
    layer, whose two norms it moves and renames.
    """

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, layer_number: int):
        super().__init__(config, submodules, layer_number=layer_number)
        self.post_self_attn_layernorm = self._modules.pop("input_layernorm")
        self.post_mlp_layernorm = self._modules.pop("pre_mlp_layernorm")

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """x (s, b, hidden) -> (output (s, b, hidden), None), as in mcore's layers. Attention is not masked."""
        y = self.post_self_attn_layernorm(x + add_bias(*self.self_attention(x, attention_mask=attention_mask)))
        return self.post_mlp_layernorm(y + add_bias(*self.mlp(y))), None


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """Returns out (..., n) plus bias (n,), which mcore's modules return separately."""
    return out if bias is None else out + bias
