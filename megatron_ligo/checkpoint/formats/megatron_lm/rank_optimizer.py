"""Adam's state in the file of one rank of Megatron-LM's: masters and moments, parameter by parameter, in and out.

    optimizer/state/NUMBER                 exp_avg, exp_avg_sq, step (or step in the groups)
    optimizer/param_groups                 params: the numbers of a group's parameters, in the model's order
    optimizer/optimizer/{state,...}        the same, of an optimizer that keeps fp32 masters
    optimizer/fp32_from_fp16_params        by group: the masters

Numbers bear no names. The model's tensors in the same file stand in the order in which they were numbered; matrices are
the first group, vectors (norms, biases), which do not decay, the other. A distributed optimizer's buffers (in files of
their own) are not read.
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

STATE, GROUPS, INNER = "state", "param_groups", "optimizer"
MASTERS = ("fp32_from_fp16_params", "fp32_from_fp16")
SIXTEEN = (torch.float16, torch.bfloat16)


@dataclass
class RankOptimizerState:
    """What a rank's optimizer holds: by a parameter's name its master, and by kind and name Adam's moments ({} where
    there are none); Adam's count and the settings of its groups. left: why none of it can be read."""

    masters: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    step: int | None = None
    groups: list[Mapping[str, object]] = field(default_factory=list)
    left: str = ""


def read(optimizer: object, weights: Mapping[str, Tensor], where: str, errors: ErrorCollector) -> RankOptimizerState:
    """What a rank saved as its optimizer, for its model's `weights` (in the file's order)."""
    if not optimizer:
        return RankOptimizerState()
    if isinstance(optimizer, list) and len(optimizer) == 1:
        # A chain of one.
        (optimizer,) = optimizer
    inner = optimizer.get(INNER, optimizer) if isinstance(optimizer, Mapping) else None
    state, groups = (inner.get(STATE), inner.get(GROUPS)) if isinstance(inner, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not _are_groups(groups):
        return RankOptimizerState(left="not one optimizer that holds its parameters' state by number")
    dealt = _dealt(groups, weights)
    if dealt is None:
        return RankOptimizerState(left="its groups are not the model's matrices and its vectors")
    states = [value for value in state.values() if isinstance(value, Mapping)]
    if state and not any(kind in value for value in states for kind in MOMENTS):
        return RankOptimizerState(left="it is not Adam's")
    found = RankOptimizerState(groups=groups)
    numbers = [number for group in groups for number in group[adam_groups.PARAMS]]
    if not all(type(number) is int for number in numbers) or len(set(numbers)) < len(numbers):
        errors.add(f"params of the groups ({where})", "each parameter's number once", "others")
        return found
    for place, listed in enumerate(_masters(optimizer)):
        names = dealt[place] if place < len(dealt) else []
        _take_masters(listed, names, weights, f"masters of group {place} ({where})", found, errors)
    if state:
        found.moments = {kind: {} for kind in MOMENTS}
        counts = set()
        for group, names in zip(groups, dealt, strict=True):
            for number, name in zip(group[adam_groups.PARAMS], names, strict=True):
                own = state.get(number)
                own = own if isinstance(own, Mapping) else {}
                for kind in MOMENTS:
                    label = f"{kind} of {name} ({where})"
                    if _is_good(own.get(kind), weights[name], label, errors):
                        found.moments[kind][name] = own[kind].detach()
                counts.add(
                    _count(own.get(adam_groups.STEP, group.get(adam_groups.STEP)), f"step of {name} ({where})", errors)
                )
        if len(counts - {None}) > 1:
            errors.add(where, "one count of Adam's steps for all parameters", sorted(counts - {None}))
        found.step = next(iter(counts - {None}), None)
    return found


def _are_groups(groups: object) -> bool:
    return isinstance(groups, list) and all(
        isinstance(group, Mapping) and isinstance(group.get(adam_groups.PARAMS), list) for group in groups
    )


def _dealt(groups: Sequence[Mapping], weights: Mapping[str, Tensor]) -> list[list[str]] | None:
    """The names of each group's parameters in the order of their numbers; None where that is not known."""
    dealt = [list(weights)]
    if len(groups) == 2:
        bare = [adam_groups.is_undecayed(group) for group in groups]
        if sum(bare) != 1:
            return None
        dealt = [[name for name, weight in weights.items() if (weight.dim() == 1) is alone] for alone in bare]
    sizes = [len(group[adam_groups.PARAMS]) for group in groups]
    return dealt if sizes == [len(names) for names in dealt] else None


def _masters(optimizer: Mapping) -> list:
    found = next((optimizer[name] for name in MASTERS if name in optimizer), [])
    return found if isinstance(found, list) else [found]


def _take_masters(
    listed: object,
    names: Sequence[str],
    weights: Mapping[str, Tensor],
    where: str,
    found: RankOptimizerState,
    errors: ErrorCollector,
) -> None:
    """Masters are kept of what the model has in 16 bits; of all its parameters where it was written for any model."""
    short = [name for name in names if weights[name].dtype in SIXTEEN]
    whose = names if isinstance(listed, list) and len(listed) == len(names) else short
    if not isinstance(listed, list) or len(listed) != len(whose):
        amount = len(listed) if isinstance(listed, list) else type(listed).__name__
        errors.add(where, f"{len(short)} tensors", amount)
        return
    for name, master in zip(whose, listed, strict=True):
        if _is_good(master, weights[name], f"{name}, {where}", errors):
            found.masters[name] = master.detach()


def _is_good(tensor: object, weight: Tensor, where: str, errors: ErrorCollector) -> bool:
    shape = tuple(weight.shape)
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
        errors.add(where, f"a tensor of shape {shape}", "none" if tensor is None else type(tensor).__name__)
    elif (tuple(tensor.shape), tensor.dtype) != (shape, torch.float32):
        errors.add(where, f"torch.float32 {shape}", f"{tensor.dtype} {tuple(tensor.shape)}")
    else:
        return True
    return False


def _count(step: object, where: str, errors: ErrorCollector) -> int | None:
    count = adam_groups.parse_step(step)
    if count is None:
        errors.add(where, "a count of steps", "none" if step is None else repr(step))
    return count


def leaves(groups: Sequence[Mapping[str, object]]) -> str:
    """Why Megatron-LM's optimizers cannot be made of these settings; "" if they can."""
    why = adam_groups.explain_unsupported(groups)
    if why:
        return why
    made = adam_groups.to_megatron_groups(groups, {})
    if [adam_groups.is_undecayed(group) for group in sorted(made, key=adam_groups.is_undecayed)] != [False, True]:
        return "the source's groups are not one that decays and one that does not"
    return ""


def made(
    model: Mapping[str, LazyTensor],
    moments: Mapping[str, Mapping[str, LazyTensor]],
    groups: Sequence[Mapping[str, object]],
    step: int,
) -> dict[str, object]:
    """What optimizers of fp32 weights and (inside, with the weights as masters) of 16-bit ones load, where torch's Adam
    or Apex's is theirs: the one counts in its state, the other in its groups.

    model: a rank's weights, fp32, in the order of Megatron-core's own parameters; moments: by kind and name; groups: as
    adam.py makes them.
    """
    groups = sorted(groups, key=adam_groups.is_undecayed)
    dealt = [
        [name for name, later in model.items() if (len(later.shape) == 1) is adam_groups.is_undecayed(g)]
        for g in groups
    ]
    numbers = {name: number for number, name in enumerate(name for names in dealt for name in names)}
    # A count for each: torch's Adam counts in place.
    state = {
        numbers[name]: {
            adam_groups.STEP: LazyTensor((), torch.float32, lambda: torch.tensor(float(step))),
            **{kind: moments[kind][name] for kind in MOMENTS},
        }
        for name in model
    }
    settings = [
        {**group, adam_groups.STEP: step, adam_groups.PARAMS: [numbers[name] for name in names]}
        for group, names in zip(groups, dealt, strict=True)
    ]
    inner = {STATE: state, GROUPS: settings}
    return {**inner, INNER: inner, MASTERS[0]: [[model[name] for name in names] for names in dealt]}
