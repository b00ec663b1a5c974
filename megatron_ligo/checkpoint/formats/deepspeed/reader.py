"""Canonical tensors out of what the ranks of a DeepSpeed engine saved: masters where there are, else module states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import EngineFiles
from megatron_ligo.checkpoint.formats.deepspeed.zero_groups import Shapes, ZeroMasters
from megatron_ligo.checkpoint.formats.hf import tensor_names
from megatron_ligo.checkpoint.formats.hf.tensor_names import StoredName
from megatron_ligo.checkpoint.io import adam_groups, tp_shards
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors

# Models that an engine trains bear Megatron-core's names, or transformers'.
NAMES = ("mcore", "hf")
EXTRA = "_extra_state"  # Megatron-core's modules save one each; none is a weight
# Megatron pads the vocabulary to a multiple of so many rows a rank; more would be another vocabulary.
PADDING = 128
# How far a tied parameter's copies may be from each other, of their largest number.
ROUNDING = 1e-3


@dataclass
class EngineRank:
    """What one tensor-parallel rank holds: module states by name, and its optimizers', one for each pipeline stage.

    shapes: of all parameters by name; trained: those that an optimizer holds. Module states that ZeRO 3 has emptied are
    not in `weights`.
    """

    weights: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    trained: set[str] = field(default_factory=set)
    masters: list[ZeroMasters] = field(default_factory=list)

    def holders(self, name: str) -> list[ZeroMasters]:
        """The stages that hold masters of a parameter: several for a tied one."""
        return [masters for masters in self.masters if name in masters]

    def dtype(self, name: str) -> torch.dtype:
        holders = self.holders(name)
        return holders[0].dtype(name) if holders else self.weights[name].dtype

    def tensor(self, name: str, kind: str) -> Tensor:
        """A tied parameter is the first stage's, as DeepSpeed has it. The stages update their own copies alike, but at
        other places of their flat tensors, where the processor rounds differently."""
        holders = self.holders(name)
        if not holders:
            return self.weights[name]
        first, *others = (masters.tensor(name, kind) for masters in holders)
        for other in others:
            apart = float((other - first).abs().max())
            if not apart <= ROUNDING * float(first.abs().max()):
                where = f"{name} ({kind}), tied"
                raise CheckpointError(Problem(where, "the same numbers on both stages", f"differences of {apart:.2g}"))
        return first.reshape(self.shapes[name])


def module_states(state: object, where: str, errors: ErrorCollector) -> dict[str, Tensor]:
    """The tensors of a module's state by name, without what Megatron-core keeps beside them."""
    if not isinstance(state, Mapping):
        errors.add(where, "a module's tensors by name", type(state).__name__)
        return {}
    found = {str(name): value for name, value in state.items() if not str(name).endswith(EXTRA)}
    for name in [name for name, value in found.items() if not isinstance(value, Tensor)]:
        errors.add(f"{name} ({where})", "a tensor", type(found.pop(name)).__name__)
    return {name: tensor.detach() for name, tensor in found.items()}


def param_shapes(state: dict, where: str, errors: ErrorCollector) -> list[Shapes]:
    """`param_shapes` of a model-states file: by group of the optimizer; [] where it has none."""
    groups = state.get("param_shapes") or []
    good = isinstance(groups, list) and all(
        isinstance(group, Mapping)
        and all(isinstance(shape, tuple | list) and _is_shape(shape) for shape in group.values())
        for group in groups
    )
    if not good:
        errors.add(where, "param_shapes, shapes by group and name", type(groups).__name__)
        return []
    return [{str(name): tuple(shape) for name, shape in group.items()} for group in groups]


def _is_shape(shape: Sequence[object]) -> bool:
    return all(type(size) is int and size >= 0 for size in shape)


def find_root(path: Path, tag: Path) -> Path:
    """The folder that states the model's sizes: the one that was named, the tag's, or the one around it."""
    return next((folder for folder in (path, tag, tag.parent) if model_record.find_record(folder)), path)


class EngineReader(Reader):
    """Canonical tensors out of the tensor-parallel ranks' states."""

    def __init__(
        self, form: str, path: Path, root: Path, saved: EngineFiles, held: list[EngineRank], errors: ErrorCollector
    ):
        self.format = form
        self.path = path
        self.model_config, self.carried = model_record.read(root)
        self.files = model_record.find_carried_files(root)
        self._ranks = held
        stored = self._located(errors)
        self._sizes = self._padded(stored, errors)
        self._check(stored, errors)
        errors.raise_if_any(self._found)
        self._items = {key: item for item in stored for key in item.keys}
        holders = [rank.holders(self._places[item.name].name) for rank in held for item in stored]
        self._moments = all(found and all(masters.has_moments for masters in found) for found in holders)
        self.step = self._steps(saved)
        found = [group for rank in held for masters in rank.masters for group in masters.groups]
        self.groups = adam_groups.read_settings(found) if self._moments else ()
        self.layout = {"tp": len(held), "pp": saved.mp // len(held), "dp": saved.dp, "zero": saved.zero}
        if self._sizes != self.model_config:
            self.layout["padded_vocab"] = self._sizes.vocab_size

    @property
    def has_moments(self) -> bool:
        return self._moments

    def info(self, key: str) -> TensorInfo:
        place = self._places[self._items[key].name]
        return TensorInfo(self.row(key).shape(self.model_config), self._ranks[0].dtype(place.name))

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        item = self._items[key]
        place = self._places[item.name]
        for double in place.duplicates:
            for number, rank in enumerate(self._ranks):
                where = f"{double} and {place.name} (rank {number}), tied"
                tp_shards.check_replicas([rank.weights[place.name], rank.weights[double]], where)
        self._places[item.name] = StoredName(place.name)
        pieces = [rank.tensor(place.name, kind) for rank in self._ranks]
        if kind != WEIGHT:
            pieces = [piece.float() for piece in pieces]
        return tp_shards.join_shards(item, key, pieces, self._sizes, self.model_config, kind)

    def _found(self) -> Iterator[tuple[str, Tensor]]:
        for number, rank in enumerate(self._ranks):
            at = f"rank {number} of {len(self._ranks)}"
            for masters in rank.masters:
                for name in sorted(masters.names()):
                    yield f"{name} ({at})", masters.tensor(name, WEIGHT)
            for name, tensor in rank.weights.items():
                if tensor.is_floating_point() and not rank.holders(name):
                    yield f"{name} ({at})", tensor

    def _located(self, errors: ErrorCollector) -> list[fused_tensors.StoredTensor]:
        """The tensors that there should be, and (as `_places`, by their names) where they stand: the engine's model
        bears Megatron-core's names or transformers'."""
        names = set(self._ranks[0].shapes)
        if self.model_config.num_layers > len(names):
            errors.add("num_layers", f"no more than the {len(names)} tensors found", self.model_config.num_layers)
            errors.raise_if_any()
        best: list[fused_tensors.StoredTensor] = []
        self._places: dict[str, StoredName] = {}
        for form in (form for form in NAMES if all(form in row.slots for row in self.arch.rows)):
            model_config = (
                tensor_names.detect_optional_parts(self.arch, self.model_config, names)
                if form == tensor_names.FORMAT
                else self.model_config
            )
            stored = fused_tensors.stored_tensors(self.arch, model_config, form)
            places = (
                tensor_names.locate_tensors(self.arch, model_config, names)
                if form == tensor_names.FORMAT
                else self._as_named(stored)
            )
            if _count(places, names) > _count(self._places, names) or not best:
                best, self._places, self.model_config = list(stored.values()), places, model_config
        return best

    def _as_named(self, stored: dict[str, fused_tensors.StoredTensor]) -> dict[str, StoredName]:
        """Megatron-core's names. What is tied may be stored beside."""
        doubles: dict[str, list[str]] = {}
        for row in self.arch.rows:
            if row.tied_to and self.model_config.tied and row.slots["mcore"].name in self._ranks[0].weights:
                doubles.setdefault(row.tied_to, []).append(row.slots["mcore"].name)
        return {name: StoredName(name, tuple(doubles.get(item.keys[0], ()))) for name, item in stored.items()}

    def _padded(self, stored: list[fused_tensors.StoredTensor], errors: ErrorCollector) -> ModelConfig:
        """The sizes with the vocabulary as the ranks have it."""
        tp, real = len(self._ranks), self.model_config.vocab_size
        name = self._places[next(item.name for item in stored if item.vocabulary)].name
        shape = self._ranks[0].shapes.get(name)
        rows = shape[0] * tp if shape else real
        if not real <= rows < real + PADDING * tp:
            errors.add(name, f"{real} rows, and fewer than {PADDING * tp} more of padding", f"{rows} (tp {tp})")
            return self.model_config
        return replace(self.model_config, vocab_size=rows)

    def _check(self, stored: list[fused_tensors.StoredTensor], errors: ErrorCollector) -> None:
        """Every tensor with its shape on every rank, and no other."""
        tp = len(self._ranks)
        for number, rank in enumerate(self._ranks):
            at = f"rank {number} of {tp}"
            allowed: set[str] = set()
            for item in stored:
                place = self._places[item.name]
                allowed |= {place.name, *place.duplicates}
                expected = item.shape(self._sizes, tp)
                found = rank.shapes.get(place.name)
                if found != expected:
                    errors.add(f"{place.name} ({at})", f"shape {expected}", found or "nothing")
                else:
                    self._check_numbers(place.name, rank, prod(expected), at, errors)
            ignored = self.arch.ignored.get(tensor_names.FORMAT, ())
            for name in sorted(set(rank.shapes) - allowed):
                if not any(fnmatch(name, pattern) for pattern in ignored):
                    errors.add(f"{name} ({at})", "no such tensor", f"shape {rank.shapes[name]}")

    def _check_numbers(self, name: str, rank: EngineRank, numel: int, at: str, errors: ErrorCollector) -> None:
        """A tensor's numbers are there: all fragments of its masters, or else its module's tensor."""
        holders = rank.holders(name)
        for masters in holders:
            if masters.numel(name) != numel:
                hint = "A rank's file is missing, or of another checkpoint."
                errors.add(f"{name} ({at})", f"{numel} numbers in ZeRO's flat tensors", masters.numel(name), hint)
        if not holders and rank.masters and name in rank.trained:
            hint = "Its masters are lost: without any optimizer file the module states would be read."
            errors.add(f"{name} ({at})", f"{numel} numbers in ZeRO's flat tensors", "none", hint)
        elif not holders and name not in rank.weights:
            errors.add(f"{name} ({at})", "its numbers in ZeRO's flat tensors", "none: was it frozen?")
        elif not holders and not rank.weights[name].is_floating_point():
            errors.add(f"{name} ({at})", "floating-point numbers", rank.weights[name].dtype)

    def _steps(self, saved: EngineFiles) -> int:
        """Adam's own count where its moments are read; the engine may have begun to count anew."""
        if not self._moments:
            return saved.global_steps
        found = {masters.step for rank in self._ranks for masters in rank.masters}
        if len(found) > 1:
            raise CheckpointError(Problem(f"{saved.tag}", "one count of Adam's steps on all ranks", sorted(found)))
        return found.pop()


def _count(places: dict[str, StoredName], names: set[str]) -> int:
    return sum(place.name in names for place in places.values())
