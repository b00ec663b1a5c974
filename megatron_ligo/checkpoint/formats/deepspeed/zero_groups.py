"""ZeRO's flat partitions: fp32 master weights and Adam moments of one model-parallel rank, addressed by parameter.

Each data-parallel rank holds one 1-D partition of the master weights per optimizer param group, and partitions of the
same layout for each moment. ZeRO 1 and 2 record the fragments of parameters in a partition (`param_slice_mappings`).
ZeRO 3 gives every rank an equal share of every parameter, in the order of `param_shapes`, with padding in the last
share. Files stay memory-mapped; only what is read is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, prod

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import adam_groups, tensor_check, torch_files
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import ErrorCollector

# A key of the file; under ZeRO 3 also the key of the base optimizer's state dict, nested in that one.
OPTIMIZER_STATE_DICT = "optimizer_state_dict"
FP32_GROUPS, FP32_FLAT_GROUPS = "single_partition_of_fp32_groups", "fp32_flat_groups"  # ZeRO 1 and 2, ZeRO 3
BASE_OPTIMIZER_STATE = "base_optimizer_state"
PARAM_SLICE_MAPPINGS = "param_slice_mappings"

ParamShapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlatFragment:
    """A contiguous range of one parameter's elements within the flat partition of one data-parallel rank."""

    dp_rank: int
    group: int
    start: int
    numel: int


class ZeroOptimizerState:
    """Master weights and moments of one model-parallel rank, assembled from all data-parallel ranks.

    step: Adam's step count, None without moments. param_groups: hyperparameters of the base optimizer's param groups,
    of every data-parallel rank, unchecked.

    states: optimizer files of the data-parallel ranks, in rank order; param_shapes: shapes by param group; where: the
    rank's name in `errors`.
    """

    def __init__(self, states: Sequence[dict], param_shapes: Sequence[ParamShapes], where: str, errors: ErrorCollector):
        self._where = where
        self._errors = errors
        self._partitions: list[dict[str, list[Tensor]]] = []  # by data-parallel rank, kind and param group
        self._fragments: dict[str, list[FlatFragment]] = {}
        self._steps: set[int | None] = set()
        self.param_groups: list[object] = []
        for dp_rank, state in enumerate(states):
            state_dict = state.get(OPTIMIZER_STATE_DICT)
            state_dict = state_dict if isinstance(state_dict, dict) else {}
            if FP32_FLAT_GROUPS in state_dict:
                base_state = state_dict.get(OPTIMIZER_STATE_DICT)
                self._partitions.append(self._read_partitions(dp_rank, state_dict[FP32_FLAT_GROUPS], base_state))
                self._add_equal_fragments(dp_rank, param_shapes, len(states))
            else:
                base_state = state_dict.get(BASE_OPTIMIZER_STATE)
                self._partitions.append(self._read_partitions(dp_rank, state_dict.get(FP32_GROUPS), base_state))
                self._add_mapped_fragments(dp_rank, state_dict.get(PARAM_SLICE_MAPPINGS))
        num_kinds = {len(partitions) for partitions in self._partitions}
        if len(num_kinds) > 1:
            errors.add(where, "moments on all data-parallel ranks, or on none", "moments on some of them")
        self.has_moments = num_kinds == {1 + len(MOMENTS)}
        if len(self._steps) > 1 or None in self._steps:
            errors.add(where, "one Adam step count for all param groups", sorted(map(str, self._steps)))
        self.step = next(iter(self._steps)) if self.has_moments else None

    def __contains__(self, name: str) -> bool:
        return name in self._fragments

    def names(self) -> set[str]:
        return set(self._fragments)

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Replaces the parameters' names by other ones, each its own."""
        self._fragments = {renamed(name): fragments for name, fragments in self._fragments.items()}

    def numel(self, name: str) -> int:
        """Returns the number of the parameter's elements that the partitions hold."""
        return sum(fragment.numel for fragment in self._fragments[name])

    def dtype(self, name: str) -> torch.dtype:
        first = self._fragments[name][0]
        return self._partitions[first.dp_rank][WEIGHT][first.group].dtype

    def read(self, name: str, kind: str) -> Tensor:
        """Reads the flat (numel,) parameter, dtype as stored; a view of the file if one rank holds all of it.

        kind: WEIGHT for the master weights, or one of MOMENTS.
        """
        pieces = []
        for fragment in self._fragments[name]:
            where = f"{kind} of {name} ({self._rank_name(fragment.dp_rank)})"
            partition = torch_files.check_stored(where, self._partitions[fragment.dp_rank][kind][fragment.group])
            pieces.append(partition.narrow(0, fragment.start, fragment.numel))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rank_name(self, dp_rank: int) -> str:
        return f"{self._where}, data-parallel rank {dp_rank}"

    def _read_partitions(self, dp_rank: int, masters: object, base_state: object) -> dict[str, list[Tensor]]:
        """Returns one rank's flat partitions by kind and param group, with moments only if the rank has any."""
        if not isinstance(masters, list) or not all(map(_is_flat, masters)):
            actual = "nothing" if masters is None else type(masters).__name__
            self._errors.add(
                self._rank_name(dp_rank), f"{FP32_GROUPS} or {FP32_FLAT_GROUPS}, a list of flat tensors", actual
            )
            return {WEIGHT: []}
        group_states = _group_states(base_state)
        self.param_groups += _param_groups(base_state)
        self._check_apart(dp_rank, masters, group_states)
        moments = {kind: [group_states.get(group, {}).get(kind) for group in range(len(masters))] for kind in MOMENTS}
        if all(tensor is None for kind in MOMENTS for tensor in moments[kind]):
            return {WEIGHT: masters}
        for group, master in enumerate(masters):
            for kind in MOMENTS:
                moment = moments[kind][group]
                if not _is_flat(moment) or moment.numel() < master.numel():
                    where = f"{kind} of group {group} ({self._rank_name(dp_rank)})"
                    found = tuple(moment.shape) if isinstance(moment, Tensor) else type(moment).__name__
                    self._errors.add(where, f"a flat tensor of {master.numel()} elements", found)
            step = group_states[group].get(adam_groups.STEP) if group in group_states else None
            self._steps.add(adam_groups.parse_step(step))
        return {WEIGHT: masters, **moments}

    def _check_apart(self, dp_rank: int, masters: list[Tensor], group_states: Mapping[int, dict]) -> None:
        """Checks that no two partitions of a rank are the same numbers of the file."""
        partitions = {f"master weights of group {group}": tensor for group, tensor in enumerate(masters)}
        for group, state in group_states.items():
            moments = {f"{kind} of group {group}": state[kind] for kind in MOMENTS if _is_flat(state.get(kind))}
            partitions |= moments
        named = {f"{name} ({self._rank_name(dp_rank)})": tensor for name, tensor in partitions.items()}
        tensor_check.check_own_bytes(named, (), self._errors)

    def _add_mapped_fragments(self, dp_rank: int, mappings: object) -> None:
        """Adds the fragments that ZeRO 1 and 2 record, none of which may share numbers with another."""
        num_groups = len(self._partitions[dp_rank][WEIGHT])
        are_mappings = isinstance(mappings, list) and all(isinstance(mapping, dict) for mapping in mappings)
        if not are_mappings or len(mappings) != num_groups:
            found = f"{len(mappings)} dicts" if are_mappings else type(mappings).__name__
            expected = f"{PARAM_SLICE_MAPPINGS}, a dict for each of {num_groups} param groups"
            self._errors.add(self._rank_name(dp_rank), expected, found)
            return
        for group, mapping in enumerate(mappings):
            ranges = []
            for name, address in mapping.items():
                start, numel = getattr(address, "start", None), getattr(address, "numel", None)
                if self._add_fragment(str(name), FlatFragment(dp_rank, group, start, numel)):
                    ranges.append((start, start + numel, str(name)))
            ranges.sort()
            for (_, end, first), (start, _, second) in pairwise(ranges):
                if start < end:
                    where = f"{second} ({self._rank_name(dp_rank)})"
                    self._errors.add(where, "numbers of its own in the flat partition", f"those of {first}")

    def _add_equal_fragments(self, dp_rank: int, param_shapes: Sequence[ParamShapes], dp_size: int) -> None:
        """Adds the fragments that follow from ZeRO 3's equal shares."""
        num_groups = len(self._partitions[dp_rank][WEIGHT])
        if num_groups != len(param_shapes):
            where, expected = self._rank_name(dp_rank), f"{len(param_shapes)} flat groups, as in param_shapes"
            self._errors.add(where, expected, num_groups)
            return
        for group, shapes in enumerate(param_shapes):
            start = 0
            for name, shape in shapes.items():
                numel = prod(shape)
                share = ceil(numel / dp_size)
                own_numel = max(min(share, numel - dp_rank * share), 0)
                self._add_fragment(name, FlatFragment(dp_rank, group, start, own_numel))
                start += share

    def _add_fragment(self, name: str, fragment: FlatFragment) -> bool:
        """Adds a fragment. Returns whether it has elements, and lies within its partition."""
        size = self._partitions[fragment.dp_rank][WEIGHT][fragment.group].numel()
        are_counts = all(type(number) is int and number >= 0 for number in (fragment.start, fragment.numel))
        if not are_counts or fragment.start + fragment.numel > size:
            where = f"{name} ({self._rank_name(fragment.dp_rank)})"
            found = f"{fragment.numel} elements from {fragment.start} on"
            self._errors.add(where, f"a range within the partition's {size} elements", found)
            return False
        if fragment.numel:
            self._fragments.setdefault(name, []).append(fragment)
        return fragment.numel > 0


def _is_flat(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_floating_point()


def _group_states(base_state: object) -> dict[int, dict]:
    """Returns the base optimizer's state by param group. Some optimizers count steps in the group, not in the state."""
    if isinstance(base_state, list):  # DeepSpeed's elastic checkpoints
        return {group: state for group, state in enumerate(base_state) if isinstance(state, dict)}
    if not isinstance(base_state, dict) or not isinstance(base_state.get("state"), dict):
        return {}
    steps = {
        number: {adam_groups.STEP: group[adam_groups.STEP]}
        for number, group in enumerate(_param_groups(base_state))
        if isinstance(group, dict) and adam_groups.STEP in group
    }
    states = {number: state for number, state in base_state["state"].items() if isinstance(state, dict)}
    return {number: {**steps.get(number, {}), **state} for number, state in states.items()}


def _param_groups(base_state: object) -> list:
    param_groups = base_state.get("param_groups") if isinstance(base_state, dict) else None
    return param_groups if isinstance(param_groups, list) else []
