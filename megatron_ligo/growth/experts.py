"""Growth into mixtures of experts, and of mixtures.

A dense model is a mixture with one expert, whatever its router says. The map of the space `expert`, (large, small),
grows both the router's rows and the experts: a large expert is a sum of small ones with its row's weights.

Legend: f width of a small expert, F of a large one; G shards, the least number with G F >= f.

If F < f, every G consecutive large experts are the shards of one copy: the ffn's map is (G F, f), each expert takes its
F rows of it, and `down` is multiplied by G, as a token that is routed to a copy weighs each of its shards by 1 / G. The
shards share their router row, so a router that ranks one of them ranks all. gate and up are not scaled: the activation
between them is not linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import expert_index, key_pattern, layer_index
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem

ROUTER_STD = 0.02  # of the rows of a router that the small model does not have


def as_mixture(dense: ModelConfig) -> ModelConfig:
    """Returns a dense model's config as one with one expert. ConfigError if its family has no such form."""
    if dense.num_experts:
        return dense
    arch = architectures.get(dense.arch)
    if dense.model_type not in arch.expert_types:
        raise ConfigError(
            Problem("large.num_experts", f"none: {dense.model_type} has no form with experts here", "experts")
        )
    model_type = arch.expert_types[dense.model_type]
    (mixture,) = (known for known in architectures.architectures().values() if model_type in known.model_types)
    routing = {"num_experts": 1, "top_k": 1, "renormalises_routing": True}
    return replace(dense, arch=mixture.name, model_type=model_type, **routing)


def num_shards(small: ModelConfig, large: ModelConfig) -> int:
    """Returns G: the large experts that hold one small expert; 1 without experts."""
    return -(-small.ffn_size // large.ffn_size) if large.num_experts else 1


def shard_rows(key: str, small: ModelConfig, large: ModelConfig) -> slice | None:
    """Returns the rows of the ffn's map that an expert's key takes; None for all rows."""
    expert, shards = expert_index(key), num_shards(small, large)
    if expert is None or shards == 1:
        return None
    start = expert % shards * large.ffn_size
    return slice(start, start + large.ffn_size)


def read_mixture(weights: Tensor, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Returns a function that reads a small layer's key of any expert as the sum of its experts, (out, in).

    weights: (small experts,), of the sum.
    """
    sources = [int(i) for i in weights.nonzero().flatten()]

    def read_sum(key: str) -> Tensor:
        pattern, layer = key_pattern(key), layer_index(key)
        if len(sources) == 1 and weights[sources[0]] == 1:
            return read(pattern.format(layer, sources[0]))
        parts = (read(pattern.format(layer, i)) * weights[i] for i in sources)
        return sum(parts, torch.zeros(()))

    return read_sum


def repeat_shards(copies: Tensor, shards: int) -> Tensor:
    """Gives each of a copy's shards its row: (large / G, small) -> (large, small)."""
    return copies.repeat_interleave(shards, dim=0)


def draw_router(large: ModelConfig, shards: int, generator: torch.Generator) -> Tensor:
    """Draws a router's weight, (experts, hidden), fp32, N(0, 0.02^2): shards of one copy share a row."""
    rows = torch.randn(large.num_experts // shards, large.hidden_size, generator=generator)
    return repeat_shards(ROUTER_STD * rows, shards)


def check_experts(small: ModelConfig, large: ModelConfig, is_lossless: bool, errors: ErrorCollector) -> None:
    """Adds an error for numbers of experts that no map reaches, or that a lossless start cannot keep."""
    if not large.num_experts:
        return
    shards = num_shards(small, large)
    step = shards * small.num_experts
    experts = f"{small.num_experts} of the small model" if small.num_experts > 1 else "a dense block"
    if large.num_experts % step:
        reason = f"a multiple of {step}: {experts}, each in {shards} of width {large.ffn_size}"
        errors.add("large.num_experts", reason, large.num_experts)
        return
    copies = large.num_experts // step
    if not is_lossless:
        return
    if small.num_experts == 1:
        if large.top_k % shards:
            errors.add("large.top_k", f"a multiple of {shards}, the experts that hold one copy", large.top_k)
        if not large.renormalises_routing:
            hint = "The weights of the chosen experts do not add up to 1: take a family that renormalises them."
            errors.add("large.num_experts", "none: no start is lossless", large.num_experts, hint)
    elif large.top_k != small.top_k * shards * copies:
        expected = f"{small.top_k * shards * copies}, all {shards * copies} that hold each of the small model's choices"
        errors.add("large.top_k", expected, large.top_k)
