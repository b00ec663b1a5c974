"""Which kind of attention (window, chunks, rotary positions or none) each layer of the large model has.

A large layer has the kind of the small layers that it starts from. A mix of unlike layers is none of them, so it is
refused, and a fit learns no such mix.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import LAYER_PATTERNS, LayerKind, ModelConfig
from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.growth.operator import Operator, short_key


def has_unlike_layers(small: ModelConfig) -> bool:
    """True if layers of a model have different kinds of attention."""
    return len(set(layer_kinds(small))) > 1


def layer_kinds(model_config: ModelConfig) -> list[LayerKind]:
    """Returns the kind of each layer."""
    return [model_config.layer_kind(layer) for layer in range(model_config.num_layers)]


def patterns_by_source(small: ModelConfig, sources: list[int]) -> dict[str, tuple | None]:
    """Returns the patterns of a large model, each of whose layers has the kind of one small layer.

    sources: the small layer of each large one.
    """
    stated = {name: getattr(small, name) for name in LAYER_PATTERNS}
    return {name: flags and tuple(flags[source] for source in sources) for name, flags in stated.items()}


def spread_patterns(small: ModelConfig, num_layers: int) -> dict[str, tuple | None]:
    """Returns the patterns of a large model in which each layer is followed by its copies."""
    return patterns_by_source(small, [layer * small.num_layers // num_layers for layer in range(num_layers)])


def follow_depth(operator: Operator) -> ModelConfig:
    """Returns the large config whose layers have the kinds of those that they start from.

    ConfigError that names the parameters which mix unlike layers.
    """
    small, large = operator.small, operator.large
    if all(getattr(small, name) is None for name in LAYER_PATTERNS):
        return large
    kinds = layer_kinds(small)
    errors = ErrorCollector("the layers of the small model differ in their attention", ConfigError)
    params = operator.arch.layer_params(large)
    starts = {short_key(param): operator.tensor(f"depth.{short_key(param)}") != 0 for param in params}
    sources = []
    for layer in range(large.num_layers):
        mixed = {key: used[layer].nonzero().flatten().tolist() for key, used in starts.items()}
        everywhere = sorted({source for own in mixed.values() for source in own})
        sources.append(everywhere[0] if everywhere else layer * small.num_layers // large.num_layers)
        if len({kinds[source] for source in everywhere}) > 1:
            _add_mix(layer, mixed, kinds, errors)
            break
    errors.raise_if_any()
    return replace(large, **patterns_by_source(small, sources))


def _add_mix(layer: int, mixed: dict[str, list[int]], kinds: list[LayerKind], errors: ErrorCollector) -> None:
    names = [key for key, own in mixed.items() if len({kinds[source] for source in own}) > 1] or list(mixed)
    first = {kinds[source]: source for own in reversed(mixed.values()) for source in reversed(own)}
    found = ", ".join(f"layer {source} ({kind.describe()})" for kind, source in first.items())
    hint = "Take one depth_init for all parameters: 'lossless', 'interlace', 'stack' or 'copy'."
    expected = f"layers of one kind for large layer {layer}"
    errors.add(f"operator.depth_init ({', '.join(sorted(names))})", expected, f"a mix of {found}", hint)


def like_layers(small: ModelConfig, large: ModelConfig, layer: int) -> Tensor:
    """Returns which small layers a large one may mix, (small layers,), bool: those of its own kind."""
    kind = large.layer_kind(layer)
    return torch.tensor([other == kind for other in layer_kinds(small)])
