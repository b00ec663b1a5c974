"""Sinks of attention heads (a learned logit in each head's softmax), grown like their heads."""

from __future__ import annotations

from torch import Tensor, nn

from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.growth.width_maps import apply_map
from megatron_ligo.models.factored.context import FactoredContext, add_lag
from megatron_ligo.models.factored.factored_linears import FactoredModule


class FactoredSinks(FactoredModule):
    """The core attention of a layer with a grown sink for each of this rank's heads.

    attention: Megatron-core's or this package's module, whose place this one takes.
    """

    attention: nn.Module

    def __init__(self, context: FactoredContext, specs: list[ParamSpec], layer: int):
        super().__init__()
        self.context = context
        (self.spec,) = specs
        self.lag = context.lag_shard(self.spec, layer)

    def build(self, mixed, maps, dtype):
        matrix, lift = self.context.map_for(maps, self.spec, 0)
        tensor = mixed[self.spec.key]
        return [add_lag(apply_map(tensor, tensor.dim() - 1, matrix, lift), self.lag).to(dtype)]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options) -> Tensor:
        """query (s, b, heads, d); key, value (s, b, groups, d) -> (s, b, heads d)."""
        (sinks,), _ = self.operands()
        return self.attention(query, key, value, attention_mask, sinks=sinks, **options)
