"""What stands before and after the layers of the large model in its factored form.

Legend: s sequence, b batch, D2 large hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ligo.arch.spec import Architecture, Task
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.models.factored.context import FactoredContext, with_lag
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.full.image_classifier import image_tokens
from megatron_ligo.models.mcore.layer_spec import ACTIVATIONS


class FactoredEmbedding(nn.Module):
    """Token ids (b, s) -> (s, b, D2): the frozen small embedding, cut over the vocabulary, times expand^T.

    Under sequence parallelism the layers have s / tp tokens of each sequence on each rank.
    """

    def __init__(self, runtime: FactoredContext):
        super().__init__()
        self.runtime = runtime

    def forward(self, tokens: Tensor) -> Tensor:
        runtime = self.runtime
        maps = runtime.matrices()
        h = map_for_use(maps, "residual", False).apply(self._looked_up(tokens, runtime.source.outside))
        if runtime.added_outside:
            h = h + self._looked_up(tokens, runtime.added_outside)
        return runtime.outside_norm("embed_norm", h, maps) if "embed_norm" in runtime.source.outside else h

    def _looked_up(self, tokens: Tensor, outside: Mapping[str, Tensor]) -> Tensor:
        """Tokens (b, s) -> (s, b, features), by tables of so many features."""
        runtime, table = self.runtime, outside["embed"]
        first = runtime.mesh.tp_rank * table.shape[0]
        here = (tokens >= first) & (tokens < first + table.shape[0])
        rows = F.embedding((tokens - first).masked_fill(~here, 0), table).masked_fill(~here[..., None], 0.0)
        return runtime.with_positions(runtime.leave_tp_region(rows.transpose(0, 1)), outside).to(runtime.dtype)


class FactoredPatchEmbedding(nn.Module):
    """Images (b, channels, side, side) -> (s, b, D2): what the frozen small embedding makes of them, times expand^T."""

    def __init__(self, runtime: FactoredContext):
        super().__init__()
        self.runtime = runtime

    def forward(self, images: Tensor) -> Tensor:
        runtime, outside = self.runtime, self.runtime.source.outside
        special = outside["class_token"], outside.get("distillation_token")
        small = image_tokens(images, outside["patch"], outside["patch_bias"], special, outside["positions"])
        if runtime.sequence_parallel:
            small = small.chunk(runtime.mesh.tp)[runtime.mesh.tp_rank]
        return map_for_use(runtime.matrices(), "residual", False).apply(small.to(runtime.dtype))


def input_class(arch: Architecture) -> type[nn.Module]:
    """What stands before the layers."""
    return FactoredPatchEmbedding if arch.task is Task.LABEL else FactoredEmbedding


class FactoredHead(nn.Module):
    """(s, b, D2) -> logits (s, b, padded vocabulary / tp): final norm (where there is none: the masked-LM head's
    transform), contract, the frozen small head. Of an image only the class's token is read: (1, b, ...).

    A tied head reads with expand^T, for the large embedding that it shares is small embedding x expand^T.
    """

    def __init__(self, runtime: FactoredContext):
        super().__init__()
        self.runtime = runtime

    def forward(self, h: Tensor) -> Tensor:
        runtime = self.runtime
        arch, large, outside = runtime.operator.arch, runtime.operator.large, runtime.source.outside
        maps = runtime.matrices()
        of_class = arch.task is Task.LABEL
        if of_class and not runtime.sequence_parallel:
            h = h[:1]
        h = runtime.outside_norm("final_norm", h, maps) if "final_norm" in arch.by_key else self._transformed(h, maps)
        space = arch.space(arch.row("head").axes[1], large)
        u = runtime.enter_tp_region(map_for_use(maps, space, not large.tied).apply_transposed(h))
        u = u[:1] if of_class else u
        bias = outside.get("head_bias")
        logits = F.linear(u, outside["head"].to(h.dtype), None if bias is None else bias.to(h.dtype))
        added = runtime.added_outside
        if added:
            # In place: a third copy of the logits would weigh more than a layer.
            logits += F.linear(runtime.enter_tp_region(h), added["head"].to(h.dtype))
            logits = with_lag(logits, added.get("head_bias"))
        return logits

    def _transformed(self, h: Tensor, maps: dict[str, LinearMap]) -> Tensor:
        runtime = self.runtime
        arch, large, outside = runtime.operator.arch, runtime.operator.large, runtime.source.outside
        weight, bias = (outside[key].to(h.dtype) for key in ("head_dense", "head_dense_bias"))
        space = arch.space(arch.row("head_dense").axes[0], large)
        small = F.linear(map_for_use(maps, "residual", True).apply_transposed(h), weight, bias)
        activation = ACTIVATIONS[arch.head_activation or large.activation]
        return runtime.outside_norm("head_norm", activation(map_for_use(maps, space, False).apply(small)), maps)
