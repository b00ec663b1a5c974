"""Growth into mixtures of experts, and of mixtures.

A dense model is a mixture with one expert, whatever its router says. The map of the space `expert`, (large, small),
grows both the router's rows and the experts: a large expert is a sum of small ones with its row's weights.

Legend: f width of a small expert, F of a large one; G shards, the least number with G F >= f.

If F < f, every G consecutive large experts are the shards of one copy: the ffn's map is (G F, f), each expert takes its
F rows of it, and `down` is multiplied by G, as a token that is routed to a copy weighs each of its shards by 1 / G. The
shards share their router row, so a router that ranks one of them ranks all. gate and up are not scaled: the activation
between them is not linear.

A softmax before the choice, whose weights are not divided by their sum, keeps the function of a mixture (copies share a
weight equally) and not that of a dense block, unless a shared expert holds it: the others then write nothing at first.

Random numbers, of new experts and of neurons that `operator.expert_drop` drops, are N(0, 1 / fan_in) where they read
the residual stream, and N(0, 1 / (2 L fan_in)) where they write it, L large layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec, Role, expert_index, key_pattern, layer_index
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import OperatorSection, ParallelSection

ROUTER_STD = 0.02  # of the rows of a router that the small model does not have


ROUTED_BLOCK = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
SHARED_BLOCK = (
    Role.SHARED_EXPERT_GATE,
    Role.SHARED_EXPERT_UP,
    Role.SHARED_EXPERT_DOWN,
    Role.SHARED_EXPERT_WEIGHT,
)
READING_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.SHARED_EXPERT_GATE, Role.SHARED_EXPERT_UP)
ABSENT_WIDTH = 1  # of the block that a dense model lacks as a mixture
SHARED = "shared"  # operator.expert_start: the shared expert holds the dense block


def as_mixture(dense: ModelConfig, start: str | None = None) -> ModelConfig:
    """Returns a dense model's config as one with one expert. ConfigError if its family has no such form.

    start: operator.expert_start, by which the expert or the shared expert holds the block. The other has ABSENT_WIDTH.
    """
    if dense.num_experts:
        return dense
    arch = architectures.get(dense.arch)
    if dense.model_type not in arch.expert_types:
        raise ConfigError(
            Problem("large.num_experts", f"none: {dense.model_type} has no form with experts here", "experts")
        )
    model_type = arch.expert_types[dense.model_type]
    (mixture,) = (known for known in architectures.architectures().values() if model_type in known.model_types)
    sizes = {"num_experts": 1, "top_k": 1, "renormalises_routing": True}
    if mixture.has(Role.SHARED_EXPERT_UP):
        sizes["shared_expert_ffn_size"] = ABSENT_WIDTH
        if start == SHARED:
            sizes |= {"ffn_size": ABSENT_WIDTH, "shared_expert_ffn_size": dense.ffn_size}
    elif start == SHARED:
        hint = "Take a family that has one, such as qwen2 (qwen2_moe)."
        raise ConfigError(Problem("operator.expert_start", f"copies: {model_type} has no shared expert", start, hint))
    return replace(dense, arch=mixture.name, model_type=model_type, **sizes)


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


def absent_block(small: ModelConfig, settings: OperatorSection) -> tuple[Role, ...]:
    """Returns the roles of the block that holds nothing of a dense model: it writes nothing, whatever the maps."""
    block, width = SHARED_BLOCK, small.shared_expert_ffn_size
    if settings.expert_start == SHARED:
        block, width = ROUTED_BLOCK, small.ffn_size
    return block if small.num_experts == 1 and width == ABSENT_WIDTH else ()


def absent_maps(small: ModelConfig, settings: OperatorSection) -> tuple[str, ...]:
    """Returns the width maps of that block, on which the loss does not depend."""
    absent = absent_block(small, settings)
    # A router beside it is the operator's own.
    return () if not absent else ("shared_ffn",) if absent == SHARED_BLOCK else ("ffn", "expert")


def is_new(role: Role, small: ModelConfig, settings: OperatorSection) -> bool:
    """True if a parameter reads the residual stream for an expert that holds nothing of the dense small model."""
    return role in READING_ROLES and role in absent_block(small, settings)


def draw_expert(param: ParamSpec, large: ModelConfig, generator: torch.Generator) -> Tensor:
    """Draws an expert's matrix in its large shape, (out, in), fp32."""
    shape = param.shape(large)
    fan_in = shape[1] * (2 * large.num_layers if param.writes_residual else 1)
    return torch.randn(shape, generator=generator) * fan_in**-0.5


def choose_dropped(width: int, rate: float, generator: torch.Generator) -> Tensor:
    """Returns the neurons of an expert that start anew, (m,), int64, in random order."""
    return torch.randperm(width, generator=generator)[: round(rate * width)]


def drop_neurons(grown: Tensor, drawn: Tensor, param: ParamSpec, chosen: Tensor) -> Tensor:
    """Replaces an expert's weights of the chosen neurons: (out, in) -> (out, in)."""
    dim = 1 if param.writes_residual else 0
    return grown.index_copy(dim, chosen, drawn.index_select(dim, chosen).to(grown))


def check_copies_of_ranks(small: ModelConfig, large: ModelConfig, parallel: ParallelSection) -> None:
    """Raises ConfigError if a fit's tensor-parallel ranks would have no row of some of their experts."""
    if not large.num_experts:
        return
    shards, local = num_shards(small, large), large.num_experts // parallel.ep
    if parallel.tp > 1 and local % shards:
        hint = "Every tensor-parallel rank needs rows of some expert."
        expected = f"a multiple of {shards} experts a rank with tp > 1"
        raise ConfigError(Problem(f"ep = {parallel.ep}", expected, local, hint))


def check_experts(
    small: ModelConfig, large: ModelConfig, settings: OperatorSection, is_lossless: bool, errors: ErrorCollector
) -> None:
    """Adds an error for numbers of experts that no map reaches, or that a lossless start cannot keep."""
    implied = architectures.get(large.arch).implied_sizes.get(large.model_type, {})
    if implied.get("renormalises_routing", large.renormalises_routing) != large.renormalises_routing:
        expected = f"{implied['renormalises_routing']}, or unset: {large.model_type} knows no other"
        errors.add("large.renormalises_routing", expected, large.renormalises_routing)
    if not large.num_experts:
        return
    if settings.expert_start == SHARED:
        if not absent_block(small, settings):
            errors.add("operator.expert_start", "copies: the small model has experts", SHARED)
        if settings.expert_drop:
            hint = "All routed experts are new."
            errors.add("operator.expert_drop", "0 with expert_start = 'shared'", settings.expert_drop, hint)
        return
    shards = num_shards(small, large)
    step = shards * small.num_experts
    experts = f"{small.num_experts} of the small model" if small.num_experts > 1 else "a dense block"
    if large.num_experts % step:
        reason = f"a multiple of {step}: {experts}, each in {shards} of width {large.ffn_size}"
        errors.add("large.num_experts", reason, large.num_experts)
        return
    copies = large.num_experts // step
    if not is_lossless or settings.expert_drop:
        return
    if small.num_experts == 1:
        if large.top_k % shards:
            errors.add("large.top_k", f"a multiple of {shards}, the experts that hold one copy", large.top_k)
        if not large.renormalises_routing and large.top_k < large.num_experts:
            share = large.top_k / large.num_experts
            hint = (
                f"The chosen experts' weights add up to about {share:.2g} instead of 1, and the blocks would return "
                "that share. Take a router that renormalises them, or operator.expert_start = 'shared'."
            )
            errors.add("large.num_experts", "none: no copies of a dense block are lossless", large.num_experts, hint)
        return
    if large.renormalises_routing != small.renormalises_routing:
        hint = "Otherwise the weights of its experts add up to another number."
        errors.add("large.renormalises_routing", "unset, as in the small model", large.renormalises_routing, hint)
    if large.top_k != small.top_k * shards * copies:
        expected = f"{small.top_k * shards * copies}, all {shards * copies} that hold each of the small model's choices"
        errors.add("large.top_k", expected, large.top_k)
