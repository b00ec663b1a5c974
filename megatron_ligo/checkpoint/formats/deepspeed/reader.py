"""Reads canonical tensors from a DeepSpeed engine's rank files: master weights if saved, else module states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.mcore_names import EXTRA_STATE
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import ParamShapes, ZeroOptimizerState
from megatron_ligo.checkpoint.formats.hf import tensor_names
from megatron_ligo.checkpoint.formats.hf.tensor_names import StoredName
from megatron_ligo.checkpoint.io import adam_groups, tp_shards
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.distributed.parallel_dims import EngineLayout, ParallelDims
from megatron_ligo.sharding import fused_tensors

# The formats whose parameter names an engine's model may have.
NAMING_FORMATS = ("mcore", "hf")
# Megatron-LM pads each rank's share of the vocabulary to a multiple of this.
VOCAB_DIVISOR = 128
# Largest difference between the stages' copies of a tied parameter, relative to its largest absolute value.
TIED_TOLERANCE = 1e-3


@dataclass
class EngineRank:
    """State of one tensor-parallel rank over all pipeline stages.

    module_state: weights by name, without those that ZeRO 3 leaves empty; shapes: this rank's shape of each parameter;
    trained: names of the optimizer's parameters; optimizer_states: one per pipeline stage, none without optimizer
    files.
    """

    module_state: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    trained: set[str] = field(default_factory=set)
    optimizer_states: list[ZeroOptimizerState] = field(default_factory=list)

    def find_optimizer_states(self, name: str) -> list[ZeroOptimizerState]:
        """Returns the states that hold a parameter: a tied one is on both its stages."""
        return [state for state in self.optimizer_states if name in state]

    def dtype(self, name: str) -> torch.dtype:
        states = self.find_optimizer_states(name)
        return states[0].dtype(name) if states else self.module_state[name].dtype

    def read(self, name: str, kind: str) -> Tensor:
        """Reads this rank's shard of a parameter or of a moment, in its own shape and stored dtype.

        A tied parameter is read from its first stage, as DeepSpeed does. Each stage updates its own copy; the copies
        differ by rounding, as they lie at different offsets of the flat partitions. Raises CheckpointError if they
        differ by more.
        """
        states = self.find_optimizer_states(name)
        if not states:
            return self.module_state[name]
        first, *copies = (state.read(name, kind) for state in states)
        for copy in copies:
            difference = float((copy - first).abs().max())
            if not difference <= TIED_TOLERANCE * float(first.abs().max()):
                where = f"{name} ({kind}), tied"
                raise CheckpointError(
                    Problem(where, "equal copies on both stages", f"a difference of {difference:.2g}")
                )
        return first.reshape(self.shapes[name])


def read_module_state(state: object, where: str, errors: ErrorCollector) -> dict[str, Tensor]:
    """Returns a module's tensors by name, in their stored shapes, without Megatron-core's extra states."""
    if not isinstance(state, Mapping):
        errors.add(where, "a module's state dict", type(state).__name__)
        return {}
    values = {str(name): value for name, value in state.items() if not str(name).endswith(EXTRA_STATE)}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    for name in (name for name in values if name not in tensors):
        errors.add(f"{name} ({where})", "a tensor", type(values[name]).__name__)
    return tensors


def read_param_shapes(state: dict, where: str, errors: ErrorCollector) -> list[ParamShapes]:
    """Returns `param_shapes` of a model-states file, one mapping per optimizer param group; [] if it has none."""
    groups = state.get("param_shapes") or []
    are_shapes = isinstance(groups, list) and all(
        isinstance(group, Mapping)
        and all(isinstance(shape, tuple | list) and _is_shape(shape) for shape in group.values())
        for group in groups
    )
    if not are_shapes:
        errors.add(where, "param_shapes, shapes by param group and name", type(groups).__name__)
        return []
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]


def _is_shape(shape: Sequence[object]) -> bool:
    return all(type(size) is int and size >= 0 for size in shape)


def find_root(path: Path, tag_folder: Path) -> Path:
    """Returns the folder with the model's config: `path`, the tag's folder or its parent, else `path`."""
    folders = (path, tag_folder, tag_folder.parent)
    return next((folder for folder in folders if model_record.has_record(folder)), path)


class EngineReader(Reader):
    """Joins the shards of all tensor-parallel ranks into canonical tensors."""

    def __init__(
        self,
        format_name: str,
        path: Path,
        root: Path,
        engine_files: EngineFiles,
        ranks: list[EngineRank],
        accepted: AcceptedKeys,
        errors: ErrorCollector,
    ):
        self.format = format_name
        self.path = path
        self.model_config, self.carried = model_record.read(root, accepted)
        self.files = model_record.find_carried_files(root)
        self._ranks = ranks
        stored_tensors, self._names, self.model_config = self._match_names(errors)
        self._padded_config = self._with_stored_vocab(stored_tensors, errors)
        self._check(stored_tensors, errors)
        errors.raise_if_any(self._iter_tensors)
        self._stored_by_key = {key: stored for stored in stored_tensors for key in stored.keys}
        states_by_tensor = [
            rank.find_optimizer_states(self._names[stored.name].name) for rank in ranks for stored in stored_tensors
        ]
        self._has_moments = all(states and all(state.has_moments for state in states) for states in states_by_tensor)
        self.step = self._read_step(engine_files)
        param_groups = [group for rank in ranks for state in rank.optimizer_states for group in state.param_groups]
        self.groups = adam_groups.read_settings(param_groups) if self._has_moments else ()
        tp = len(ranks)
        dims = ParallelDims(tp, engine_files.mp_world_size // tp, engine_files.dp_world_size)
        self.layout = EngineLayout(dims, engine_files.zero_stage).to_json()
        if self._padded_config != self.model_config:
            self.layout["padded_vocab"] = self._padded_config.vocab_size

    @property
    def has_moments(self) -> bool:
        return self._has_moments

    def info(self, key: str) -> TensorInfo:
        name = self._names[self._stored_by_key[key].name].name
        return TensorInfo(self.param(key).shape(self.model_config), self._ranks[0].dtype(name))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        stored = self._stored_by_key[key]
        stored_name = self._names[stored.name]
        for duplicate in stored_name.duplicates:
            for number, rank in enumerate(self._ranks):
                where = f"{duplicate} and {stored_name.name} (rank {number}), tied"
                tp_shards.check_replicas([rank.module_state[stored_name.name], rank.module_state[duplicate]], where)
        # Compared once: later reads skip it.
        self._names[stored.name] = StoredName(stored_name.name)
        shards = [rank.read(stored_name.name, kind) for rank in self._ranks]
        if kind != WEIGHT:
            shards = [shard.float() for shard in shards]
        return tp_shards.join_shards(stored, key, shards, self._padded_config, self.model_config, kind)

    def _rank_name(self, number: int) -> str:
        return f"rank {number} of {len(self._ranks)}"

    def _iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every rank's tensors, each with a name for error messages."""
        for number, rank in enumerate(self._ranks):
            for state in rank.optimizer_states:
                for name in sorted(state.names()):
                    yield f"{name} ({self._rank_name(number)})", state.read(name, WEIGHT)
            for name, tensor in rank.module_state.items():
                if tensor.is_floating_point() and not rank.find_optimizer_states(name):
                    yield f"{name} ({self._rank_name(number)})", tensor

    def _match_names(
        self, errors: ErrorCollector
    ) -> tuple[list[fused_tensors.StoredTensor], dict[str, StoredName], ModelConfig]:
        """Picks the naming, Megatron-core's or transformers', that matches the most of the ranks' names.

        Returns the expected tensors, the names that the ranks have for them, and the config that follows.
        """
        names = set(self._ranks[0].shapes)
        if self.model_config.num_layers > len(names):
            errors.add("num_layers", f"at most {len(names)}, the number of tensors", self.model_config.num_layers)
            errors.raise_if_any()
        best: tuple[list[fused_tensors.StoredTensor], dict[str, StoredName], ModelConfig] | None = None
        for naming in NAMING_FORMATS:
            if any(naming not in param.locations for param in self.arch.params):
                continue
            model_config = self.model_config
            if naming == tensor_names.FORMAT:
                model_config = tensor_names.detect_optional_parts(self.arch, model_config, names)
            expected = fused_tensors.stored_tensors(self.arch, model_config, naming)
            if naming == tensor_names.FORMAT:
                stored_names = tensor_names.locate_tensors(self.arch, model_config, names)
            else:
                stored_names = self._mcore_names(expected)
            if best is None or _count_matches(stored_names, names) > _count_matches(best[1], names):
                best = list(expected.values()), stored_names, model_config
        assert best is not None, f"{self.arch.name} has no names in {' or '.join(NAMING_FORMATS)}"
        return best

    def _mcore_names(self, expected: dict[str, fused_tensors.StoredTensor]) -> dict[str, StoredName]:
        """Returns Megatron-core's names. A tied parameter may be stored a second time, under its own name."""
        duplicates: dict[str, list[str]] = {}
        for param in self.arch.params:
            if (
                param.tied_to
                and self.model_config.tied
                and param.locations["mcore"].name in self._ranks[0].module_state
            ):
                duplicates.setdefault(param.tied_to, []).append(param.locations["mcore"].name)
        return {name: StoredName(name, tuple(duplicates.get(stored.keys[0], ()))) for name, stored in expected.items()}

    def _with_stored_vocab(
        self, stored_tensors: list[fused_tensors.StoredTensor], errors: ErrorCollector
    ) -> ModelConfig:
        """Returns the model's config with the padded vocabulary size of the ranks' shards."""
        tp, vocab_size = len(self._ranks), self.model_config.vocab_size
        name = self._names[next(stored.name for stored in stored_tensors if stored.is_vocab_parallel)].name
        shape = self._ranks[0].shapes.get(name)
        rows = shape[0] * tp if shape else vocab_size
        if not vocab_size <= rows < vocab_size + VOCAB_DIVISOR * tp:
            expected = f"{vocab_size} rows, with fewer than {VOCAB_DIVISOR * tp} rows of padding"
            errors.add(name, expected, f"{rows} (tp {tp})")
            return self.model_config
        return replace(self.model_config, vocab_size=rows)

    def _check(self, stored_tensors: list[fused_tensors.StoredTensor], errors: ErrorCollector) -> None:
        """Checks that every rank holds each tensor in its shape, and no others."""
        tp = len(self._ranks)
        ignored = self.arch.ignored_names.get(tensor_names.FORMAT, ())
        for number, rank in enumerate(self._ranks):
            where = self._rank_name(number)
            expected_names: set[str] = set()
            for stored in stored_tensors:
                stored_name = self._names[stored.name]
                expected_names |= {stored_name.name, *stored_name.duplicates}
                expected = stored.shape(self._padded_config, tp)
                found = rank.shapes.get(stored_name.name)
                if found != expected:
                    errors.add(f"{stored_name.name} ({where})", f"shape {expected}", found or "nothing")
                else:
                    self._check_elements(stored_name.name, rank, prod(expected), where, errors)
            for name in sorted(set(rank.shapes) - expected_names):
                if not any(fnmatch(name, pattern) for pattern in ignored):
                    errors.add(f"{name} ({where})", "no such tensor", f"shape {rank.shapes[name]}")

    def _check_elements(self, name: str, rank: EngineRank, numel: int, where: str, errors: ErrorCollector) -> None:
        """Checks that a parameter's master weights are complete, or else that the module state has the parameter."""
        states = rank.find_optimizer_states(name)
        complete = f"{numel} elements in ZeRO's flat partitions"
        for state in states:
            if state.numel(name) != numel:
                hint = "A rank's file is missing or belongs to another checkpoint."
                errors.add(f"{name} ({where})", complete, state.numel(name), hint)
        if states:
            return
        if rank.optimizer_states and name in rank.trained:
            hint = "Its master weights are lost. Without any optimizer files, the module states would be read."
            errors.add(f"{name} ({where})", complete, "none", hint)
        elif name not in rank.module_state:
            errors.add(f"{name} ({where})", complete, "none", "Was the parameter frozen?")
        elif not rank.module_state[name].is_floating_point():
            errors.add(f"{name} ({where})", "a floating-point dtype", rank.module_state[name].dtype)

    def _read_step(self, engine_files: EngineFiles) -> int:
        """Returns Adam's step count if moments are read, as the engine may have restarted its own count."""
        if not self._has_moments:
            return engine_files.global_steps
        steps = {state.step for rank in self._ranks for state in rank.optimizer_states}
        if len(steps) > 1:
            raise CheckpointError(
                Problem(f"{engine_files.tag_folder}", "one Adam step count on all ranks", sorted(steps))
            )
        return steps.pop()


def _count_matches(stored_names: dict[str, StoredName], names: set[str]) -> int:
    return sum(stored_name.name in names for stored_name in stored_names.values())
