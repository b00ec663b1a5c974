"""Adam's state in a Megatron-LM rank file: fp32 master weights and moments, read and built by parameter.

    optimizer/state/NUMBER                 exp_avg, exp_avg_sq, step (or step in the param groups)
    optimizer/param_groups                 params: parameter numbers of the group, in the model's order
    optimizer/optimizer/{state,...}        the same, for an optimizer with fp32 master weights
    optimizer/fp32_from_fp16_params        master weights by param group

Parameters have numbers and no names. The order of the model's tensors in the same file gives the numbering: matrices
are the first group, vectors (norms, biases), which have no weight decay, the second. The buffers of a distributed
optimizer, which has files of its own, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import adam_groups
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.reader import MOMENTS
from megatron_ligo.common.errors import ErrorCollector

STATE, PARAM_GROUPS, INNER_OPTIMIZER = "state", "param_groups", "optimizer"
MASTER_WEIGHTS = ("fp32_from_fp16_params", "fp32_from_fp16")
HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass
class RankOptimizerState:
    """Optimizer state of one rank, by the names of its module's parameters.

    masters: fp32 master weights by name; moments: by kind and name ({} if there are none); step: Adam's step count;
    unsupported: why the state cannot be read, "" if it can.
    """

    masters: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    step: int | None = None
    param_groups: list[Mapping[str, object]] = field(default_factory=list)
    unsupported: str = ""


def read_rank_optimizer(
    optimizer: object, weights: Mapping[str, Tensor], where: str, errors: ErrorCollector
) -> RankOptimizerState:
    """Reads a rank's saved optimizer: masters and moments in the shapes of `weights`.

    weights: the rank's module, in the order of the file.
    """
    if not optimizer:
        return RankOptimizerState()
    if isinstance(optimizer, list) and len(optimizer) == 1:
        # A ChainedOptimizer of one.
        (optimizer,) = optimizer
    inner = optimizer.get(INNER_OPTIMIZER, optimizer) if isinstance(optimizer, Mapping) else None
    state, param_groups = (inner.get(STATE), inner.get(PARAM_GROUPS)) if isinstance(inner, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not _are_param_groups(param_groups):
        return RankOptimizerState(unsupported="not a single optimizer with its state by parameter number")
    group_names = _assign_names(param_groups, weights)
    if group_names is None:
        return RankOptimizerState(unsupported="its param groups are not the model's matrices and its vectors")
    param_states = [value for value in state.values() if isinstance(value, Mapping)]
    if state and not any(kind in param_state for param_state in param_states for kind in MOMENTS):
        return RankOptimizerState(unsupported="it is not Adam's")
    rank_state = RankOptimizerState(param_groups=param_groups)
    numbers = [number for group in param_groups for number in group[adam_groups.PARAMS]]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        errors.add(f"params of the param groups ({where})", "each parameter number once", "duplicates, or no numbers")
        return rank_state
    for number, masters in enumerate(_find_masters(optimizer)):
        names = group_names[number] if number < len(group_names) else []
        label = f"master weights of group {number} ({where})"
        rank_state.masters |= _name_masters(masters, names, weights, label, errors)
    if state:
        _read_moments(rank_state, state, group_names, weights, where, errors)
    return rank_state


def _are_param_groups(param_groups: object) -> bool:
    return isinstance(param_groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get(adam_groups.PARAMS), list) for group in param_groups
    )


def _assign_names(param_groups: Sequence[Mapping], weights: Mapping[str, Tensor]) -> list[list[str]] | None:
    """Returns the parameter names of each group in the order of their numbers; None if they cannot be known."""
    group_names = [list(weights)]
    if len(param_groups) == 2:
        undecayed = [adam_groups.is_undecayed(group) for group in param_groups]
        if sum(undecayed) != 1:
            return None
        group_names = [
            [name for name, weight in weights.items() if (weight.dim() == 1) is are_vectors]
            for are_vectors in undecayed
        ]
    sizes = [len(group[adam_groups.PARAMS]) for group in param_groups]
    return group_names if sizes == [len(names) for names in group_names] else None


def _find_masters(optimizer: Mapping) -> list:
    masters = next((optimizer[name] for name in MASTER_WEIGHTS if name in optimizer), [])
    return masters if isinstance(masters, list) else [masters]


def _name_masters(
    masters: object, names: Sequence[str], weights: Mapping[str, Tensor], where: str, errors: ErrorCollector
) -> dict[str, Tensor]:
    """Returns a group's master weights by name. Megatron-LM keeps them for 16-bit weights, this program for all."""
    half_names = [name for name in names if weights[name].dtype in HALF_DTYPES]
    master_names = names if isinstance(masters, list) and len(masters) == len(names) else half_names
    if not isinstance(masters, list) or len(masters) != len(master_names):
        found = len(masters) if isinstance(masters, list) else type(masters).__name__
        errors.add(where, f"{len(half_names)} tensors", found)
        return {}
    return {
        name: master.detach()
        for name, master in zip(master_names, masters, strict=True)
        if _is_fp32_like(master, weights[name], f"{name}, {where}", errors)
    }


def _read_moments(
    rank_state: RankOptimizerState,
    state: Mapping,
    group_names: list[list[str]],
    weights: Mapping[str, Tensor],
    where: str,
    errors: ErrorCollector,
) -> None:
    """Sets the moments and the step count of `rank_state`."""
    rank_state.moments = {kind: {} for kind in MOMENTS}
    steps = set()
    for group, names in zip(rank_state.param_groups, group_names, strict=True):
        for number, name in zip(group[adam_groups.PARAMS], names, strict=True):
            param_state = state.get(number)
            param_state = param_state if isinstance(param_state, Mapping) else {}
            for kind in MOMENTS:
                moment = param_state.get(kind)
                if _is_fp32_like(moment, weights[name], f"{kind} of {name} ({where})", errors):
                    rank_state.moments[kind][name] = moment.detach()
            step = param_state.get(adam_groups.STEP, group.get(adam_groups.STEP))
            steps.add(_parse_step(step, f"step of {name} ({where})", errors))
    if len(steps - {None}) > 1:
        errors.add(where, "one Adam step count for all parameters", sorted(steps - {None}))
    rank_state.step = next(iter(steps - {None}), None)


def _is_fp32_like(tensor: object, weight: Tensor, where: str, errors: ErrorCollector) -> bool:
    """Returns whether a tensor is dense, fp32 and of the weight's shape; adds an error if not."""
    shape = tuple(weight.shape)
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        errors.add(where, f"a tensor of shape {shape}", "none" if tensor is None else type(tensor).__name__)
    elif (tuple(tensor.shape), tensor.dtype) != (shape, torch.float32):
        errors.add(where, f"torch.float32 {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
    else:
        return True
    return False


def _parse_step(step: object, where: str, errors: ErrorCollector) -> int | None:
    count = adam_groups.parse_step(step)
    if count is None:
        errors.add(where, "a step count", "none" if step is None else repr(step))
    return count


def explain_unsupported(groups: Sequence[Mapping[str, object]]) -> str:
    """Returns why Megatron-LM's optimizers cannot have these param groups; "" if they can."""
    reason = adam_groups.explain_unsupported(groups)
    if reason:
        return reason
    megatron_groups = adam_groups.to_megatron_groups(groups, {})
    if sorted(map(adam_groups.is_undecayed, megatron_groups)) != [False, True]:
        return "the source's groups are not one with weight decay and one without"
    return ""


def build_rank_optimizer(
    weights: Mapping[str, LazyTensor],
    moments: Mapping[str, Mapping[str, LazyTensor]],
    groups: Sequence[Mapping[str, object]],
    step: int,
) -> dict[str, object]:
    """Builds a state dict that both kinds of optimizer load: of fp32 weights, and of 16-bit ones with master weights.

    The latter read the inner optimizer, with the weights as masters. torch's Adam reads the step count from its state,
    Apex's from its param groups.

    weights: of one rank, fp32, in the order of Megatron-core's parameters; moments: by kind and name; groups: from
    `adam_groups.to_megatron_groups`.
    """
    groups = sorted(groups, key=adam_groups.is_undecayed)
    group_names = [
        [name for name, weight in weights.items() if (len(weight.shape) == 1) is adam_groups.is_undecayed(group)]
        for group in groups
    ]
    numbers = {name: number for number, name in enumerate(name for names in group_names for name in names)}
    # A step tensor per parameter: torch's Adam increments it in place.
    state = {
        numbers[name]: {
            adam_groups.STEP: LazyTensor((), torch.float32, lambda: torch.tensor(float(step))),
            **{kind: moments[kind][name] for kind in MOMENTS},
        }
        for name in weights
    }
    param_groups = [
        {**group, adam_groups.STEP: step, adam_groups.PARAMS: [numbers[name] for name in names]}
        for group, names in zip(groups, group_names, strict=True)
    ]
    inner = {STATE: state, PARAM_GROUPS: param_groups}
    masters = [[weights[name] for name in names] for names in group_names]
    return {**inner, INNER_OPTIMIZER: inner, MASTER_WEIGHTS[0]: masters}
