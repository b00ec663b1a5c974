"""Layers whose blocks are normalised or scaled before the residual sum (OLMo 2, Gemma, DINOv2, Granite).

Megatron-core's own layer adds what a block returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_ligo.models.mcore.post_norm_layer import add_bias


@dataclass
class ResidualBranchSubmodules(TransformerLayerSubmodules):
    """The modules of a layer, with norms and learned scales after its two blocks."""

    post_self_attn_layernorm: type = IdentityOp
    post_mlp_layernorm: type = IdentityOp
    post_self_attn_scale: type = IdentityOp
    post_mlp_scale: type = IdentityOp


class ResidualBranchLayer(TransformerLayer):
    """x (s, b, hidden) -> y + m scale(norm(mlp(norm(y)))) with y = x + m scale(norm(attention(norm(x)))).

    Each norm and each learned scale may be missing.

    m: the config's `residual_multiplier`, which layer_spec.py sets.
    """

    def __init__(self, config: TransformerConfig, submodules: ResidualBranchSubmodules, **options):
        super().__init__(config, submodules, **options)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **sizes)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **sizes)
        self.post_self_attn_scale = build_module(submodules.post_self_attn_scale, **sizes)
        self.post_mlp_scale = build_module(submodules.post_mlp_scale, **sizes)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """x (s, b, hidden) -> (output (s, b, hidden), None), as in mcore's layers."""
        attended = self.self_attention(
            self.input_layernorm(x), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        attended = self.post_self_attn_scale(self.post_self_attn_layernorm(add_bias(*attended)))
        y = x + self._multiply(attended)
        out = self.post_mlp_layernorm(add_bias(*self.mlp(self.pre_mlp_layernorm(y))))
        return y + self._multiply(self.post_mlp_scale(out)), None

    def _multiply(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else x * self.multiplier
