"""The ends of a factored model: the embedding before its layers, the head after them.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ligo.arch.architecture import Architecture, Task
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.models.factored.context import FactoredContext, add_lag
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.factored.step_state import StepState
from megatron_ligo.models.full.image_classifier import image_tokens
from megatron_ligo.models.mcore.layer_spec import ACTIVATIONS, normalization
from megatron_ligo.models.mcore.norm import normalise


class FactoredEnd(nn.Module):
    """What stands at an end of the layers. It holds no parameters: its small weights are frozen."""

    def __init__(self, context: FactoredContext, state: StepState):
        super().__init__()
        self.context = context
        self.state = state

    def apply_norm(self, key: str, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """Applies the grown norm whose gain has this key to h (s or s / tp, b, D2)."""
        context = self.context
        arch, large, outside = context.operator.arch, context.operator.large, context.source.outside
        gain, bias = arch.param(key), arch.params_by_key.get(f"{key}_bias")
        expand = map_for_use(maps, arch.space(gain.axes[0], large), False)
        weight = add_lag(context.grow_gain(gain, outside[key], expand), context.outside_lag.get(key))
        shift = None
        if bias is not None:
            grown = context.grow_norm_bias(bias, outside[bias.key], expand)
            shift = add_lag(grown, context.outside_lag.get(bias.key)).to(h.dtype)
        return normalise(h, weight.to(h.dtype), shift, large.norm_eps, normalization(large))


class FactoredEmbedding(FactoredEnd):
    """Token ids (b, s) -> (s or s / tp, b, D2): the frozen small embedding, split over the vocabulary, times expand^T.

    Under sequence parallelism each rank keeps s / tp tokens of each sequence.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) int64 -> (s or s / tp, b, D2) in the step state's dtype."""
        context = self.context
        maps = self.state.shared_maps()
        h = map_for_use(maps, "residual", False).apply(self._look_up(tokens, context.source.outside))
        if context.outside_lag:
            h = h + self._look_up(tokens, context.outside_lag)
        return self.apply_norm("embed_norm", h, maps) if "embed_norm" in context.source.outside else h

    def _look_up(self, tokens: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """tokens (b, s) -> (s or s / tp, b, features), from tables of that many features."""
        context, table = self.context, tables["embed"]
        first = context.mesh.tp_rank * table.shape[0]
        is_local = (tokens >= first) & (tokens < first + table.shape[0])
        rows = F.embedding((tokens - first).masked_fill(~is_local, 0), table).masked_fill(~is_local[..., None], 0.0)
        return self._add_positions(context.leave_tp_region(rows.transpose(0, 1)), tables).to(self.state.dtype)

    def _add_positions(self, h: Tensor, tables: Mapping[str, Tensor]) -> Tensor:
        """Adds the rows of this rank's positions, and of the first segment, to h (s or s / tp, b, features), where
        they are learned."""
        context, table, segments = self.context, tables.get("positions"), tables.get("token_types")
        if table is None:
            return h
        first = context.operator.small.first_position
        first += context.mesh.tp_rank * h.shape[0] if context.sequence_parallel else 0
        h = h + table[first : first + h.shape[0], None]
        return h if segments is None else h + segments[0]


class FactoredPatchEmbedding(FactoredEnd):
    """Images -> (s or s / tp, b, D2): the frozen small embedding of special tokens and patches, times expand^T."""

    def forward(self, images: Tensor) -> Tensor:
        """images (b, channels, side, side) -> (s or s / tp, b, D2) in the step state's dtype."""
        context, outside = self.context, self.context.source.outside
        special = outside["class_token"], outside.get("distillation_token")
        small = image_tokens(images, outside["patch"], outside["patch_bias"], special, outside["positions"])
        if context.sequence_parallel:
            small = small.chunk(context.mesh.tp)[context.mesh.tp_rank]
        return map_for_use(self.state.shared_maps(), "residual", False).apply(small.to(self.state.dtype))


def embedding_class(arch: Architecture) -> type[FactoredEnd]:
    return FactoredPatchEmbedding if arch.task is Task.LABEL else FactoredEmbedding


class FactoredHead(FactoredEnd):
    """Final norm or head transform, then the frozen small head, split over the vocabulary, times contract."""

    def forward(self, h: Tensor) -> Tensor:
        """h (s or s / tp, b, D2) -> logits (s, b, padded vocabulary / tp); of a classifier (1, b, padded labels / tp),
        from the first token."""
        context = self.context
        arch, large, outside = context.operator.arch, context.operator.large, context.source.outside
        maps = self.state.shared_maps()
        is_classifier = arch.task is Task.LABEL
        if is_classifier and not context.sequence_parallel:
            h = h[:1]
        h = self.apply_norm("final_norm", h, maps) if "final_norm" in arch.params_by_key else self._transform(h, maps)
        space = arch.space(arch.param("head").axes[1], large)
        u = context.enter_tp_region(map_for_use(maps, space, not large.tied).apply_transposed(h))
        u = u[:1] if is_classifier else u
        bias = outside.get("head_bias")
        logits = F.linear(u, outside["head"].to(h.dtype), None if bias is None else bias.to(h.dtype))
        lag = context.outside_lag
        if lag:
            # In place: a third copy of the logits would take more memory than a layer.
            logits += F.linear(context.enter_tp_region(h), lag["head"].to(h.dtype))
            logits = add_lag(logits, lag.get("head_bias"))
        return logits

    def _transform(self, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """A masked-LM head's transform: linear, activation and norm, (s or s / tp, b, D2) -> the same shape."""
        context = self.context
        arch, large, outside = context.operator.arch, context.operator.large, context.source.outside
        weight, bias = (outside[key].to(h.dtype) for key in ("head_dense", "head_dense_bias"))
        space = arch.space(arch.param("head_dense").axes[0], large)
        small = F.linear(map_for_use(maps, "residual", True).apply_transposed(h), weight, bias)
        activation = ACTIVATIONS[arch.head_activation or large.activation]
        return self.apply_norm("head_norm", activation(map_for_use(maps, space, False).apply(small)), maps)
