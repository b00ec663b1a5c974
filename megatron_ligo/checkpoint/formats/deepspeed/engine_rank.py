"""State of one tensor-parallel rank of a DeepSpeed engine: module states, ZeRO's partitions, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, prod

import torch
from torch import Tensor

from megatron_ligo.arch.mcore_names import EXTRA_STATE
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import FROZEN_SHAPES
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ParamShapes, ZeroOptimizerState
from megatron_ligo.checkpoint.formats.megatron_lm import old_names
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

# Largest difference between the stages' copies of a tied parameter, relative to its largest absolute value.
TIED_TOLERANCE = 1e-3


@dataclass
class EngineRank:
    """State of one tensor-parallel rank over all pipeline stages.

    module_state: weights by name, without those that ZeRO 3 leaves empty; shapes: this rank's shape of each parameter;
    trained: names of the optimizer's parameters; optimizer_states: one per pipeline stage, none without optimizer
    files; frozen: under ZeRO 3, the flat parts of parameters that are not trained, of the data-parallel ranks in order.
    """

    module_state: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    trained: set[str] = field(default_factory=set)
    optimizer_states: list[ZeroOptimizerState] = field(default_factory=list)
    frozen: dict[str, list[Tensor]] = field(default_factory=dict)

    def rename(self, renamed: Callable[[str], str]) -> None:
        """Replaces the parameters' names by other ones, each its own."""
        self.module_state = {renamed(name): tensor for name, tensor in self.module_state.items()}
        self.shapes = {renamed(name): shape for name, shape in self.shapes.items()}
        self.trained = {renamed(name) for name in self.trained}
        self.frozen = {renamed(name): fragments for name, fragments in self.frozen.items()}
        for state in self.optimizer_states:
            state.rename(renamed)

    def find_optimizer_states(self, name: str) -> list[ZeroOptimizerState]:
        """Returns the states that hold a parameter: a tied one is on both its stages."""
        return [state for state in self.optimizer_states if name in state]

    def dtype(self, name: str) -> torch.dtype:
        states = self.find_optimizer_states(name)
        if states:
            return states[0].dtype(name)
        return self.frozen[name][0].dtype if name in self.frozen else self.module_state[name].dtype

    def read(self, name: str, kind: str) -> Tensor:
        """Reads this rank's shard of a parameter or of a moment, in its own shape and stored dtype.

        A tied parameter is read from its first stage, as DeepSpeed does. Each stage updates its own copy; the copies
        differ by rounding, as they lie at different offsets of the flat partitions. Raises CheckpointError if they
        differ by more.
        """
        states = self.find_optimizer_states(name)
        if not states:
            return self._read_frozen(name) if name in self.frozen else self.module_state[name]
        first, *copies = (state.read(name, kind) for state in states)
        for copy in copies:
            difference = float((copy - first).abs().max())
            if not difference <= TIED_TOLERANCE * float(first.abs().max()):
                where = f"{name} ({kind}), tied"
                raise CheckpointError(
                    Problem(where, "equal copies on both stages", f"a difference of {difference:.2g}")
                )
        return first.reshape(self.shapes[name])

    def _read_frozen(self, name: str) -> Tensor:
        """Joins the equal shares of the data-parallel ranks, of which the last is padded."""
        shape = self.shapes[name]
        flat = torch.cat([torch_files.check_stored(name, fragment) for fragment in self.frozen[name]])
        return flat[: prod(shape)].reshape(shape)


def read_module_state(state: object, where: str, errors: ErrorCollector) -> dict[str, Tensor]:
    """Returns a module's tensors by name, in their stored shapes, without Megatron-core's extra states.

    Megatron-DeepSpeed's modules are nested dicts: their tensors have dotted names.
    """
    if not isinstance(state, Mapping):
        errors.add(where, "a module's state dict", type(state).__name__)
        return {}
    values = {str(name): value for name, value in old_names.flatten(state) if not str(name).endswith(EXTRA_STATE)}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    for name in (name for name in values if name not in tensors):
        errors.add(f"{name} ({where})", "a tensor", type(values[name]).__name__)
    return tensors


def read_param_shapes(state: dict, where: str, errors: ErrorCollector) -> list[ParamShapes]:
    """Returns `param_shapes` of a model-states file, one mapping per optimizer param group; [] if it has none."""
    groups = state.get("param_shapes") or []
    if not isinstance(groups, list) or not all(map(_are_shapes, groups)):
        errors.add(where, "param_shapes, shapes by param group and name", type(groups).__name__)
        return []
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]


def read_frozen(
    state: dict, fragments: Sequence[Mapping[str, object]], where: str, errors: ErrorCollector
) -> tuple[ParamShapes, dict[str, list[Tensor]]]:
    """Returns shapes of the parameters that are not trained, and under ZeRO 3 their flat parts by name.

    fragments: of the data-parallel ranks of a model-parallel rank, each by name; [] under other stages.
    """
    shapes = state.get(FROZEN_SHAPES) or {}
    if not _are_shapes(shapes):
        errors.add(where, f"{FROZEN_SHAPES}, shapes by name", type(shapes).__name__)
        return {}, {}
    shapes = {str(name): tuple(shape) for name, shape in shapes.items()}
    frozen: dict[str, list[Tensor]] = {}
    for name, shape in shapes.items() if fragments else ():
        parts = [by_name.get(name) for by_name in fragments]
        share = ceil(prod(shape) / len(parts))
        if any(not isinstance(part, Tensor) or tuple(part.shape) != (share,) for part in parts):
            expected = f"flat parts of {share} elements on {len(parts)} data-parallel ranks"
            errors.add(f"{name} ({where}), frozen", expected, "others")
        elif not parts[0].is_floating_point() or len({part.dtype for part in parts}) > 1:
            errors.add(f"{name} ({where}), frozen", "one floating-point dtype", parts[0].dtype)
        else:
            frozen[name] = parts
    return shapes, frozen


def _are_shapes(shapes: object) -> bool:
    return isinstance(shapes, Mapping) and all(
        isinstance(shape, tuple | list) and all(type(size) is int and size >= 0 for size in shape)
        for shape in shapes.values()
    )
