"""The embedding and the head of a factored model.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.spec import Role
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.models.factored.context import FactoredContext, add_lag
from megatron_ligo.models.factored.factored_linears import add_new_features
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.factored.small_weights import OutsideTensors
from megatron_ligo.models.factored.step_state import StepState
from megatron_ligo.models.full.image_classifier import embed_image
from megatron_ligo.models.mcore.layer_calls import finish_logits
from megatron_ligo.models.mcore.layer_spec import ACTIVATIONS, get_normalization
from megatron_ligo.models.mcore.norm import normalise


class FactoredEnd(nn.Module):
    """Base of the embeddings and the head. It has no parameters: its small weights are frozen."""

    def __init__(self, context: FactoredContext, state: StepState):
        super().__init__()
        self.context = context
        self.state = state
        self.lag = context.outside_lag or OutsideTensors()

    def apply_norm(self, role: Role, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """Applies the grown norm of this role to h (s or s / tp, b, D2)."""
        context = self.context
        arch, large, outside, lag = context.operator.arch, context.operator.large, context.source.outside, self.lag
        gain, bias = arch.get(role), arch.find(role, bias=True)
        grown = context.enter_partial_use(gain, context.grow_gain(gain, outside.weights[role], maps))
        weight = add_lag(grown, lag.weights.get(role))
        shift = None
        if bias is not None and role in outside.biases:
            grown = context.enter_partial_use(bias, context.grow_norm_bias(bias, outside.biases[role], maps))
            shift = add_lag(grown, lag.biases.get(role)).to(h.dtype)
        return normalise(h, weight.to(h.dtype), shift, large.norm_eps, get_normalization(large))


class FactoredEmbedding(FactoredEnd):
    """Token ids (b, s) -> (s or s / tp, b, D2): the frozen vocabulary-parallel small embedding times expand^T.

    Under sequence parallelism each rank keeps s / tp tokens of each sequence.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) int64 -> (s or s / tp, b, D2) in the step state's dtype."""
        context = self.context
        maps = self.state.shared_maps()
        arch, small, large = context.operator.arch, context.operator.small, context.operator.large
        looked_up = self._look_up(tokens, context.source.outside)
        h = map_for_use(maps, "residual", False).apply(looked_up) * arch.embedding_multiplier(small)
        if context.outside_lag is not None:
            h = h + self._look_up(tokens, context.outside_lag) * arch.embedding_multiplier(large)
        if context.new_features is not None and context.new_features.weights:
            new = self._look_up(tokens, context.new_features) * arch.embedding_multiplier(large)
            h = add_new_features(h, new)
        has_norm = Role.EMBEDDING_NORM in context.source.outside.weights
        return self.apply_norm(Role.EMBEDDING_NORM, h, maps) if has_norm else h

    def _look_up(self, tokens: Tensor, tables: OutsideTensors) -> Tensor:
        """Looks up tokens (b, s) -> (s or s / tp, b, features) in tables of that many features."""
        context, table = self.context, tables.weights[Role.WORD_EMBEDDING]
        first = context.mesh.tp_rank * table.shape[0]
        is_local = (tokens >= first) & (tokens < first + table.shape[0])
        rows = F.embedding((tokens - first).masked_fill(~is_local, 0), table).masked_fill(~is_local[..., None], 0.0)
        return self._add_positions(context.leave_tp_region(rows.transpose(0, 1)), tables).to(self.state.dtype)

    def _add_positions(self, h: Tensor, tables: OutsideTensors) -> Tensor:
        """Adds the learned embeddings, if any, of this rank's positions and of the first segment to h (s or s / tp, b,
        features)."""
        context, table = self.context, tables.weights.get(Role.POSITION_EMBEDDING)
        segments = tables.weights.get(Role.TOKEN_TYPE_EMBEDDING)
        if table is None:
            return h
        part = context.mesh.sequence_part(context.sequence_parallel)
        first = context.operator.small.first_position + part * h.shape[0]
        h = h + table[first : first + h.shape[0], None]
        return h if segments is None else h + segments[0]


class FactoredPatchEmbedding(FactoredEnd):
    """Images -> (s or s / tp, b, D2): the frozen small embedding of special tokens and patches, times expand^T."""

    def forward(self, images: Tensor) -> Tensor:
        """images (b, channels, side, side) -> (s or s / tp, b, D2) in the step state's dtype."""
        context = self.context
        small = self._embed(images, context.source.outside)
        h = map_for_use(self.state.shared_maps(), "residual", False).apply(small)
        if context.new_features is not None and context.new_features.weights:
            h = add_new_features(h, self._embed(images, context.new_features))
        return h

    def _embed(self, images: Tensor, tables: OutsideTensors) -> Tensor:
        """images -> (s or s / tp, b, features), in the step state's dtype, by tables of that many features."""
        context, weights = self.context, tables.weights
        special = weights[Role.CLASS_TOKEN], weights.get(Role.DISTILLATION_TOKEN)
        patch, patch_bias = weights[Role.PATCH_EMBEDDING], tables.biases.get(Role.PATCH_EMBEDDING)
        positions, registers = weights[Role.POSITION_EMBEDDING], weights.get(Role.REGISTER_TOKENS)
        embedded = embed_image(images, patch, patch_bias, special, positions, registers)
        if context.sequence_parallel:
            embedded = embedded.chunk(context.mesh.tp)[context.mesh.tp_rank]
        return embedded.to(self.state.dtype)


def embedding_class(arch: Architecture) -> type[FactoredEnd]:
    return FactoredPatchEmbedding if arch.reads_images else FactoredEmbedding


class FactoredHead(FactoredEnd):
    """Final norm or head transform, then the contract and the frozen vocabulary-parallel small head."""

    def forward(self, h: Tensor) -> Tensor:
        """h (s or s / tp, b, D2) -> logits (s, b, padded vocabulary / tp); for a classifier (1, b, padded labels / tp),
        from the first token, and the mean of the patches if the family reads it."""
        context = self.context
        arch, large, outside = context.operator.arch, context.operator.large, context.source.outside
        maps = self.state.shared_maps()
        if arch.reads_images and not arch.has(Role.PATCH_HEAD) and not context.sequence_parallel:
            h = h[:1]
        if arch.has(Role.FINAL_NORM):
            h = self.apply_norm(Role.FINAL_NORM, h, maps)
        if arch.has(Role.HEAD_TRANSFORM):
            h = self._transform(h, maps)
        space = arch.space(arch.get(Role.HEAD).axes[1], large)
        u = context.enter_tp_region(map_for_use(maps, space, not large.tied).apply_transposed(h))
        bias = outside.biases.get(Role.HEAD)
        if large.tied and context.operator.embedding_ratio != 1:
            u = u / context.operator.embedding_ratio
        logits = self._multiply(u, outside)
        if bias is not None:
            logits = logits + bias.to(h.dtype)
        new = None if context.new_features is None else context.new_features.weights.get(Role.HEAD)
        if new is not None:
            # A tied head reads the new features of the embedding.
            whole = context.enter_tp_region(h[..., h.shape[-1] - new.shape[-1] :].contiguous())
            logits += F.linear(whole, new.to(h.dtype))
        if context.outside_lag is not None:
            # In place: another copy of the logits would take more memory than a layer.
            logits += self._multiply(context.enter_tp_region(h), self.lag)
            logits = add_lag(logits, self.lag.biases.get(Role.HEAD))
        return finish_logits(logits, large)

    def _multiply(self, x: Tensor, tensors: OutsideTensors) -> Tensor:
        """Multiplies x (s, b, features) by the heads of that many features -> (s or 1, b, padded vocabulary / tp)."""
        arch, first = self.context.operator.arch, self.context.operator.large.num_special_tokens
        weight = tensors.weights[Role.HEAD].to(x.dtype)
        product = F.linear(x[:1] if arch.reads_images else x, weight)
        if not arch.has(Role.PATCH_HEAD):
            return product
        return product + F.linear(x[first:].mean(dim=0, keepdim=True), tensors.weights[Role.PATCH_HEAD].to(x.dtype))

    def _transform(self, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        """Applies a masked-LM head's transform: linear, activation and norm, (s or s / tp, b, D2) -> the same shape."""
        context = self.context
        arch, large, outside = context.operator.arch, context.operator.large, context.source.outside
        role = Role.HEAD_TRANSFORM
        weight, bias = outside.weights[role].to(h.dtype), outside.biases.get(role)
        bias = None if bias is None else bias.to(h.dtype)
        space = arch.space(arch.get(role).axes[0], large)
        small = F.linear(map_for_use(maps, "residual", True).apply_transposed(h), weight, bias)
        activation = ACTIVATIONS[arch.head_activation or large.activation]
        return self.apply_norm(Role.HEAD_NORM, activation(map_for_use(maps, space, False).apply(small)), maps)
