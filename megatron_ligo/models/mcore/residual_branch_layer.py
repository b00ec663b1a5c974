"""Layers whose blocks are normalised before the residual sum or multiplied by a constant (OLMo 2, Gemma, Granite).

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
    """The modules of a layer, with norms after its two blocks."""

    post_self_attn_layernorm: type = IdentityOp
    post_mlp_layernorm: type = IdentityOp


class ResidualBranchLayer(TransformerLayer):
    """x (s, b, hidden) -> y + m norm(mlp(norm(y))) with y = x + m norm(attention(norm(x))). Each norm may be missing.

    m: the config's `residual_multiplier`, which layer_spec.py sets.
    """

    def __init__(self, config: TransformerConfig, submodules: ResidualBranchSubmodules, **options):
        super().__init__(config, submodules, **options)
        sizes = {"config": config, "hidden_size": config.hidden_size, "eps": config.layernorm_epsilon}
        self.post_self_attn_layernorm = build_module(submodules.post_self_attn_layernorm, **sizes)
        self.post_mlp_layernorm = build_module(submodules.post_mlp_layernorm, **sizes)
        self.multiplier = config.residual_multiplier

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, rotary_pos_emb: Tensor | None = None):
        """x (s, b, hidden) -> (output (s, b, hidden), None), as in mcore's layers."""
        attended = self.self_attention(
            self.input_layernorm(x), attention_mask=attention_mask, rotary_pos_emb=rotary_pos_emb
        )
        y = x + self._multiply(self.post_self_attn_layernorm(add_bias(*attended)))
        return y + self._multiply(self.post_mlp_layernorm(add_bias(*self.mlp(self.pre_mlp_layernorm(y))))), None

    def _multiply(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else x * self.multiplier
