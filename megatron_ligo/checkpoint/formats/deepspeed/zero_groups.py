"""ZeRO's flat tensors: the fp32 masters and Adam's moments of one model-parallel rank, parameter by parameter.

Each data-parallel rank holds, for each group of the optimizer, a 1-D piece of the masters and as much of each moment.
ZeRO 1 and 2 note the fragments of parameters in it (`param_slice_mappings`); under ZeRO 3 each rank has an equal piece
of each parameter, in the order of `param_shapes`, the last padded. Everything stays mapped until it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from megatron_ligo.checkpoint.io import adam_groups
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import ErrorCollector

STATE = "optimizer_state_dict"  # of the file; under ZeRO 3 also the base optimizer's, inside of it
MASTERS, MASTERS_3 = "single_partition_of_fp32_groups", "fp32_flat_groups"
BASE = "base_optimizer_state"
MAPPINGS = "param_slice_mappings"

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class FlatFragment:
    """Some numbers of a parameter: where they lie in a data-parallel rank's flat tensors."""

    rank: int
    group: int
    start: int
    numel: int


class ZeroMasters:
    """The parameters of one model-parallel rank's optimizer. step: Adam's count; None where there are no moments.
    groups: the settings of its groups as they are found.

    states: the optimizer files of its data-parallel ranks, in order; shapes: `param_shapes`, by group; where: what to
    call the rank in `faults`.
    """

    def __init__(self, states: Sequence[dict], shapes: Sequence[Shapes], where: str, errors: ErrorCollector):
        self._where = where
        self._faults = errors
        self._flats: list[dict[str, list[Tensor]]] = []
        self._fragments: dict[str, list[FlatFragment]] = {}
        self._steps: set[int | None] = set()
        self.groups: list[object] = []
        for rank, state in enumerate(states):
            inner = state.get(STATE)
            inner = inner if isinstance(inner, dict) else {}
            if MASTERS_3 in inner:
                self._flats.append(self._read(rank, inner[MASTERS_3], inner.get(STATE)))
                self._note_equal(rank, shapes, len(states))
            else:
                self._flats.append(self._read(rank, inner.get(MASTERS), inner.get(BASE)))
                self._note_mapped(rank, inner.get(MAPPINGS))
        kinds = {len(flats) for flats in self._flats}
        if len(kinds) > 1:
            errors.add(where, "moments on all data-parallel ranks, or on none", "some")
        self.has_moments = kinds == {1 + len(MOMENTS)}
        if len(self._steps) > 1 or None in self._steps:
            errors.add(where, "one count of Adam's steps for all groups", sorted(map(str, self._steps)))
        self.step = next(iter(self._steps)) if self.has_moments else None

    def __contains__(self, name: str) -> bool:
        return name in self._fragments

    def names(self) -> set[str]:
        return set(self._fragments)

    def numel(self, name: str) -> int:
        return sum(fragment.numel for fragment in self._fragments[name])

    def dtype(self, name: str) -> torch.dtype:
        first = self._fragments[name][0]
        return self._flats[first.rank][WEIGHT][first.group].dtype

    def tensor(self, name: str, kind: str) -> Tensor:
        """All numbers of a parameter, 1-D; a view of the file where one rank holds them all."""
        pieces = [
            self._flats[fragment.rank][kind][fragment.group].detach().narrow(0, fragment.start, fragment.numel)
            for fragment in self._fragments[name]
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _at(self, rank: int) -> str:
        return f"{self._where}, data-parallel rank {rank}"

    def _read(self, rank: int, masters: object, base: object) -> dict[str, list[Tensor]]:
        """One rank's flat tensors by group: the masters, and both moments where all groups have them."""
        if not isinstance(masters, list) or not all(map(_is_flat, masters)):
            found = "nothing" if masters is None else type(masters).__name__
            self._faults.add(self._at(rank), f"{MASTERS} or {MASTERS_3}, flat tensors by group", found)
            return {WEIGHT: []}
        states = _base_states(base)
        self.groups += _groups(base)
        moments = {kind: [states.get(group, {}).get(kind) for group in range(len(masters))] for kind in MOMENTS}
        everything = [tensor for kind in MOMENTS for tensor in moments[kind]]
        if all(tensor is None for tensor in everything):
            return {WEIGHT: masters}
        for group, flat in enumerate(masters):
            for kind in MOMENTS:
                tensor = moments[kind][group]
                if not _is_flat(tensor) or tensor.numel() < flat.numel():
                    found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                    self._faults.add(f"{kind} of group {group} ({self._at(rank)})", f"{flat.numel()} numbers", found)
            self._steps.add(adam_groups.parse_step(states[group].get("step") if group in states else None))
        return {WEIGHT: masters, **moments}

    def _note_mapped(self, rank: int, mappings: object) -> None:
        flats = self._flats[rank][WEIGHT]
        good = isinstance(mappings, list) and all(isinstance(mapping, dict) for mapping in mappings)
        if not good or len(mappings) != len(flats):
            found = f"{len(mappings)} of them" if good else type(mappings).__name__
            self._faults.add(self._at(rank), f"{MAPPINGS}, a dict for each of {len(flats)} groups", found)
            return
        for group, mapping in enumerate(mappings):
            for name, address in mapping.items():
                start, numel = getattr(address, "start", None), getattr(address, "numel", None)
                self._note(name, FlatFragment(rank, group, start, numel))

    def _note_equal(self, rank: int, shapes: Sequence[Shapes], ranks: int) -> None:
        flats = self._flats[rank][WEIGHT]
        if len(flats) != len(shapes):
            self._faults.add(self._at(rank), f"{len(shapes)} flat groups, as param_shapes has", len(flats))
            return
        for group, named in enumerate(shapes):
            start = 0
            for name, shape in named.items():
                whole = prod(shape)
                size = ceil(whole / ranks)
                self._note(name, FlatFragment(rank, group, start, max(min(size, whole - rank * size), 0)))
                start += size

    def _note(self, name: str, fragment: FlatFragment) -> None:
        flat = self._flats[fragment.rank][WEIGHT][fragment.group]
        good = all(type(number) is int and number >= 0 for number in (fragment.start, fragment.numel))
        if not good or fragment.start + fragment.numel > flat.numel():
            found = f"{fragment.numel} from {fragment.start} on"
            self._faults.add(f"{name} ({self._at(fragment.rank)})", f"a part of the {flat.numel()} numbers", found)
        elif fragment.numel:
            self._fragments.setdefault(name, []).append(fragment)


def _is_flat(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_floating_point()


def _base_states(base: object) -> dict[int, dict]:
    """The base optimizer's state by group. Some optimizers note the count of steps beside the group's settings."""
    if isinstance(base, list):  # DeepSpeed's elastic checkpoints
        return {i: state for i, state in enumerate(base) if isinstance(state, dict)}
    if not isinstance(base, dict) or not isinstance(base.get("state"), dict):
        return {}
    counts = {
        i: {"step": group["step"]}
        for i, group in enumerate(_groups(base))
        if isinstance(group, dict) and "step" in group
    }
    states = {i: state for i, state in base["state"].items() if isinstance(state, dict)}
    return {i: {**counts.get(i, {}), **state} for i, state in states.items()}


def _groups(base: object) -> list:
    """The settings of the base optimizer's groups."""
    groups = base.get("param_groups") if isinstance(base, dict) else None
    return groups if isinstance(groups, list) else []
