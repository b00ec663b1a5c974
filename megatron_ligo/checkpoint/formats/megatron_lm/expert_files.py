"""Experts in Megatron-LM's rank files: every expert-parallel rank holds a share, under numbers that start at 0.

    mlp.experts.local_experts.N.linear_fc1.weight    one by one (the tables' names)
    mlp.experts.linear_fc1.weightN                   a grouped product of Transformer Engine
    mlp.experts.weight1, mlp.experts.weight2         one of the package grouped_gemm: all experts, transposed

Each rank chains an optimizer of its experts' matrices, a single group, after one of the rest, which is the same on all
ranks.

Legend: E experts of a rank, f their width, h features of the residual stream.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import expert_index
from megatron_ligo.checkpoint.formats.megatron_lm.rank_optimizer import (
    RankOptimizerState,
    build_rank_optimizer,
    read_rank_optimizer,
)
from megatron_ligo.checkpoint.io import adam_groups
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.sharding.fused_tensors import StoredTensor

EXPERT = re.compile(r"(.*\.experts\.local_experts\.)(\d+)(\..*)")
GROUPED = re.compile(r"(.*\.experts\.)(linear_fc[12])\.weight(\d+)")
JOINED = re.compile(r"(.*\.experts\.)weight([12])")

UNCHAINED = "not one of experts after one of the rest on each expert-parallel rank"
UNLIKE_GROUPS = "its experts have other settings than its matrices"
SETTINGS = ("lr", "betas", "eps", "weight_decay")


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


def read_optimizers(
    optimizers: Sequence[object], weights: Mapping[str, Tensor], where: Sequence[str], errors: ErrorCollector
) -> RankOptimizerState:
    """Reads what the expert-parallel ranks of one stage and one tensor-parallel rank saved.

    weights: of all of them, joined, (out, in) or (n,), each expert's under its number in the layer. where: the files.
    """
    if not any(optimizers):
        return RankOptimizerState()
    numbers = {name: int(match[2]) for name, match in ((name, EXPERT.fullmatch(name)) for name in weights) if match}
    local = (max(numbers.values(), default=0) + 1) // len(optimizers)
    rest = {name: weight for name, weight in weights.items() if name not in numbers}
    joined = None
    for rank, (optimizer, file) in enumerate(zip(optimizers, where, strict=True)):
        if not isinstance(optimizer, list) or len(optimizer) != 2:
            return RankOptimizerState(unsupported=UNCHAINED)
        own = {name: weights[name] for name, number in numbers.items() if number // local == rank}
        parts = [read_rank_optimizer(*part, file, errors) for part in zip(optimizer, (rest, own), strict=True)]
        unsupported = next((part.unsupported for part in parts if part.unsupported), "")
        if not unsupported and not _have_settings_of_matrices(*parts):
            unsupported = UNLIKE_GROUPS
        if unsupported:
            return RankOptimizerState(unsupported=unsupported)
        if len({(bool(part.masters), bool(part.moments), part.step) for part in parts}) > 1:
            errors.add(file, "the same state and step for experts as for the rest", "another")
            return RankOptimizerState()
        if joined is None:
            joined = parts[0]
        else:
            _check_copies(joined, parts[0], file, errors)
        _add_state(joined, parts[1])
    return joined


def _have_settings_of_matrices(rest: RankOptimizerState, experts: RankOptimizerState) -> bool:
    """True if experts decay and learn as the other matrices do."""
    matrices = [group for group in rest.param_groups if not adam_groups.is_undecayed(group)]
    groups = [group for group in experts.param_groups if group[adam_groups.PARAMS]]
    return all(group.get(name) == matrix.get(name) for group in groups for matrix in matrices for name in SETTINGS)


def _check_copies(first: RankOptimizerState, other: RankOptimizerState, file: str, errors: ErrorCollector) -> None:
    """Adds an error for each tensor of the rest that differs from the first rank's."""
    for kind, (tensors, others) in {
        "masters": (first.masters, other.masters),
        **{kind: (moments, other.moments.get(kind, {})) for kind, moments in first.moments.items()},
    }.items():
        for name, tensor in others.items():
            if name not in tensors or not torch.equal(tensor, tensors[name]):
                errors.add(f"{kind} of {name} ({file})", "those of the first expert-parallel rank", "others")
                return


def _add_state(joined: RankOptimizerState, own: RankOptimizerState) -> None:
    joined.masters |= own.masters
    for kind, moments in own.moments.items():
        joined.moments[kind] |= moments


def build_optimizers(
    weights: Mapping[str, LazyTensor],
    moments: Mapping[str, Mapping[str, LazyTensor]],
    groups: Sequence[Mapping[str, object]],
    step: int,
) -> list[dict[str, object]]:
    """Builds the chained optimizers of one rank. Arguments: those of `build_rank_optimizer`."""
    experts = {name: weight for name, weight in weights.items() if EXPERT.fullmatch(name)}
    rest = {name: weight for name, weight in weights.items() if name not in experts}
    decayed = [{**group, "is_expert_parallel": True} for group in groups if not adam_groups.is_undecayed(group)]
    return [build_rank_optimizer(*part, step) for part in ((rest, moments, groups), (experts, moments, decayed))]
