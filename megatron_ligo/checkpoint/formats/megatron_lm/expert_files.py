"""Experts in Megatron-LM's rank files: every expert-parallel rank holds a share, under numbers that start at 0.

    mlp.experts.local_experts.N.linear_fc1.weight    one by one (the tables' names)
    mlp.experts.linear_fc1.weightN                   a grouped product of Transformer Engine
    mlp.experts.weight1, mlp.experts.weight2         one of the package grouped_gemm: all experts, transposed

Legend: E experts of a rank, f their width, h features of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import expert_index
from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.sharding.fused_tensors import StoredTensor

EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..*)")
GROUPED = re.compile(r"(.*\.experts\.)(linear_fc[12])\.weight(\d+)")
JOINED = re.compile(r"(.*\.experts\.)weight([12])")


def separate_experts(module: Mapping[str, Tensor], hidden_size: object) -> dict[str, Tensor]:
    """Returns a rank's tensors with each expert's under a name of its own.

    weight1 is split into E of (2 f, h), weight2 into E of (h, f). hidden_size: as the run's arguments state it.
    """
    separated = {}
    for name, tensor in module.items():
        grouped, joined = GROUPED.fullmatch(name), JOINED.fullmatch(name)
        if grouped:
            separated[f"{grouped[1]}local_experts.{grouped[3]}.{grouped[2]}.weight"] = tensor
        elif joined and _count_joined(module, joined[1], hidden_size):
            count = _count_joined(module, joined[1], hidden_size)
            rows = hidden_size if joined[2] == "1" else tensor.shape[0] // count
            for expert, part in enumerate(tensor.reshape(count, rows, -1)):
                separated[f"{joined[1]}local_experts.{expert}.linear_fc{joined[2]}.weight"] = part.T
        else:
            separated[name] = tensor
    return separated


def _count_joined(module: Mapping[str, Tensor], prefix: str, hidden_size: object) -> int:
    """Returns E from the shapes (h, E 2 f) and (E f, h) and the router's experts; 0 if they do not fit."""
    first, second = (module.get(f"{prefix}weight{number}") for number in (1, 2))
    router = module.get(f"{prefix.removesuffix('experts.')}router.weight")
    if any(tensor is None or tensor.dim() != 2 for tensor in (first, second, router)):
        return 0
    fits = first.shape[0] == second.shape[1] == hidden_size and first.shape[1] == 2 * second.shape[0]
    return router.shape[0] if fits and router.shape[0] and second.shape[0] % router.shape[0] == 0 else 0


def join_expert_ranks(
    modules: Sequence[Mapping[str, Tensor]], where: str, errors: ErrorCollector
) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """Joins the modules of all expert-parallel ranks of one stage and one tensor-parallel rank.

    Returns all tensors in the shapes of the files, (2 f, h) and (h, f) of an expert, under its number in the layer; and
    what the other ranks hold of the rest, by name.
    """
    joined: dict[str, Tensor] = {}
    copies: dict[str, list[Tensor]] = {}
    counts = [1 + max((int(match[2]) for match in map(EXPERT.fullmatch, module) if match), default=-1)
              for module in modules]  # fmt: skip
    if len(set(counts)) > 1:
        errors.add(where, "as many experts on each expert-parallel rank", counts)
    for rank, module in enumerate(modules):
        for name, tensor in module.items():
            match = EXPERT.fullmatch(name)
            if match:
                joined[f"{match[1]}{int(match[2]) + rank * counts[0]}{match[3]}"] = tensor
            elif rank:
                copies.setdefault(name, []).append(tensor)
            else:
                joined[name] = tensor
    for name in sorted(copies.keys() ^ {name for name in joined if not EXPERT.fullmatch(name)} if copies else ()):
        errors.add(f"{name} ({where})", "a tensor on every expert-parallel rank, or on none", "on some")
    return joined, copies


def select_experts(
    stored_tensors: Mapping[str, StoredTensor], model_config: ModelConfig, ep: int, rank: int, is_grouped: bool
) -> dict[str, StoredTensor]:
    """Returns the tensors of an expert-parallel rank by its own names: its share of the experts, and all others.

    is_grouped: experts have the names of Transformer Engine's grouped product.
    """
    count = model_config.num_experts // ep
    selected = {}
    for name, stored in stored_tensors.items():
        expert, match = expert_index(stored.keys[0]), EXPERT.fullmatch(name)
        if expert is None:
            selected[name] = stored
        elif rank * count <= expert < (rank + 1) * count:
            number = expert - rank * count
            local_name = f"{match[1]}{number}{match[3]}"
            if is_grouped:
                local_name = f"{match[1].removesuffix('local_experts.')}{match[3].removeprefix('.')}{number}"
            selected[local_name] = stored
    return selected
