"""Parameter names of Megatron-core's modules, and the order in which its layers register them.

The parameter tables name the modules of Megatron-core's local layer spec. Transformer Engine's layer spec keeps a
layer's norms inside the linears that follow them; distributed checkpoints use its names under either spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby

# Transformer Engine's name of a norm inside a linear -> the name of the local layer spec's norm module.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# Name of the modules' fp8 state in checkpoints. It is not a weight.
EXTRA_STATE = "_extra_state"
LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")
EXPERT_NUMBER = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")
# Submodules of a local layer in construction order, which is the order of the optimizer's parameters.
CONSTRUCTION_ORDER = (
    "input_layernorm.",
    "self_attention.core_attention.",
    "self_attention.linear_proj.",
    "self_attention.linear_qkv.",
    "self_attention.q_layernorm.",
    "self_attention.k_layernorm.",
    "pre_mlp_layernorm.",
    "mlp.",
)


def to_local_name(name: str, first_expert: int = 0) -> str:
    """Returns the parameter's name under the local layer spec, from its name under either spec.

    first_expert: the number in the whole layer of the first expert of this rank, whose modules count from 0.
    """
    for fused, local in FUSED_NORMS.items():
        name = name.replace(fused, local)
    return EXPERT_NUMBER.sub(lambda match: str(int(match[0]) + first_expert), name) if first_expert else name


def to_fused_name(name: str) -> str:
    """Returns the parameter's name under Transformer Engine's layer spec. Inverse of `to_local_name`."""
    for fused, local in FUSED_NORMS.items():
        name = name.replace(local, fused)
    return name


def sort_by_construction(names: Iterable[str]) -> list[str]:
    """Sorts the names within each layer into the order in which Megatron-core constructs the parameters.

    Layers, and the names outside of them, keep their order.
    """
    layers = groupby(names, lambda name: next(iter(LAYER_NUMBER.findall(name)), None))
    return [name for _, layer in layers for name in sorted(layer, key=_construction_rank)]


def _construction_rank(name: str) -> int:
    ranks = (rank for rank, module in enumerate(CONSTRUCTION_ORDER) if module in name)
    return next(ranks, len(CONSTRUCTION_ORDER))
