"""Megatron-core's distributed checkpoints (torch_dist): global tensors in chunks, for any tensor and pipeline layout.

    DIR/latest_checkpointed_iteration.txt     which folder (iterations.py)
    DIR/iter_0000100/metadata.json            the kind of checkpoint
    DIR/iter_0000100/.metadata                each tensor and its chunks (dcp_metadata.py)
    DIR/iter_0000100/__0_0.distcp             archives of torch.save, one a chunk, one after the other
    DIR/iter_0000100/common.pt                iteration, the run's arguments, what belongs to no tensor (or an object
                                              of the checkpoint: mcore_names.py)

Adam's tensors for a weight bear its name after `optimizer.state.exp_avg.` and the like; its count of steps and the
settings of its groups are in common.pt.

Megatron-core's own layers norm first, and their blocks stand in turn: networks whose norms come last (BERT) or whose
blocks stand side by side (GPT-NeoX) are stored, but no model of its loads them to the same numbers.
A layer's tensors are stacked to (layers, ...), or have names of their own. Norms bear Transformer Engine's names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.spec import Pack, layer_index
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata, writer
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA_FILE, ChunkedTensor, TensorChunk
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import (
    BACKEND,
    COMMON,
    COMMON_OBJECT,
    CONFIG,
    MASTERS,
    fused_name,
    stacked_name,
    state_name,
)
from megatron_ligo.checkpoint.formats.megatron_lm import arguments
from megatron_ligo.checkpoint.io import adam_groups, iteration_folders, torch_files, tp_shards
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor

NAME = "mcore"
# What is no model's.
OTHERS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")


@dataclass(frozen=True)
class StackedPart:
    """A tensor of the checkpoint, or one layer of it."""

    name: str
    layer: int | None

    def of(self, state: str) -> StackedPart:
        """The optimizer's tensor for this one."""
        return replace(self, name=state_name(self.name, state))


class McoreReader(Reader):
    """Canonical tensors out of the chunks, each mapped; only what is in several chunks is put together in memory."""

    format = NAME

    def __init__(self, path: Path):
        self.path = path
        self._folder = iteration_folders.require_folder(path)
        _check_backend(self._folder / CONFIG)
        self._contents = dcp_metadata.read_metadata(self._folder)
        common = self._common()
        self.model_config, self.carried, self.files = arguments.read_model_config(self._folder, common.get("args"))
        self._items: dict[str, StoredTensor] = {}
        self._parts: dict[str, tuple[StackedPart, ...]] = {}
        self._rows = self._check()
        self.layout = {"padded_vocab": self._rows} if self._rows > self.model_config.vocab_size else {}
        self._master = next((state for state in MASTERS if self._has(state)), None)
        self._moments = all(self._has(kind) for kind in MOMENTS)
        self.unread = self._left()
        self.step = _step(self._folder / COMMON, common, self._moments)
        self.groups = _groups(common.get("optimizer")) if self._moments else ()

    @property
    def has_moments(self) -> bool:
        return self._moments

    def _common(self) -> dict:
        """What belongs to no tensor."""
        path, place = self._folder / COMMON, self._contents.objects.get(COMMON_OBJECT)
        if place and not path.is_file():
            path, start, length = self._folder / place[0], *place[1:]
            listed = torch_files.load_part(path, start, length, arguments.STAND_INS)
            common = listed[0] if isinstance(listed, list) and len(listed) == 1 else listed
        else:
            common = torch_files.load(path, arguments.STAND_INS)
        if not isinstance(common, dict):
            raise CheckpointError(Problem(f"{path}", "a dict of what is no tensor", type(common).__name__))
        return common

    def info(self, key: str) -> TensorInfo:
        part = self._parts[self._items[key].name][0]
        return TensorInfo(self.param(key).shape(self.model_config), self._entry(self._weight(part)).dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        item = self._items[key]
        parts = [self._weight(part) if kind == WEIGHT else part.of(kind) for part in self._parts[item.name]]
        if len(parts) > 1:
            return self._tensor(parts[item.keys.index(key)])
        stored = replace(self.model_config, vocab_size=self._rows)
        return tp_shards.join_shards(item, key, [self._tensor(parts[0])], stored, self.model_config, parts[0].name)

    def _weight(self, part: StackedPart) -> StackedPart:
        """Where the weight is most exact."""
        return part.of(self._master) if self._master else part

    def _entry(self, part: StackedPart) -> ChunkedTensor:
        return self._contents.tensors[part.name]

    def _tensor(self, part: StackedPart) -> Tensor:
        entry, at = self._entry(part), part.layer
        chunks = [c for c in entry.chunks if at is None or c.offset[0] <= at < c.offset[0] + c.shape[0]]
        if len(chunks) == 1:
            return self._block(entry, chunks[0], at)
        model_config = slice(None) if at is None else slice(1, None)
        whole = torch.empty(entry.shape[model_config], dtype=entry.dtype)
        for chunk in chunks:
            target = whole
            for dim, (start, size) in enumerate(
                zip(chunk.offset[model_config], chunk.shape[model_config], strict=True)
            ):
                target = target.narrow(dim, start, size)
            target.copy_(self._block(entry, chunk, at))
        return whole

    def _block(self, entry: ChunkedTensor, chunk: TensorChunk, at: int | None) -> Tensor:
        block = torch_files.map_tensor(self._folder / chunk.file, chunk.file_offset, chunk.file_length)
        if (tuple(block.shape), block.dtype) != (chunk.shape, entry.dtype):
            found = f"{block.dtype} {tuple(block.shape)}"
            where = f"{self._folder / chunk.file} at {chunk.file_offset}"
            raise CheckpointError(Problem(where, f"{entry.dtype} {chunk.shape}", found))
        return block if at is None else block[at - chunk.offset[0]]

    def _found(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self._contents.tensors.items():
            for chunk in entry.chunks if entry.dtype.is_floating_point else ():
                yield f"{name} from {chunk.offset} on", self._block(entry, chunk, None)

    def _check(self) -> int:
        """Finds every tensor, with its shape and dtype, and no others. The rows of the vocabulary as stored."""
        tensors = self._contents.tensors
        errors = ErrorCollector(f"{self._folder} does not hold the model of its sizes", CheckpointError)
        stacks = [entry.shape[0] for name, entry in tensors.items() if re.search(r"\.layers\.\D", name) and entry.shape]
        if self.model_config.num_layers > max(len(tensors), *stacks, 0):
            # Lying sizes must not make us list a million layers.
            errors.add(
                "num_layers",
                f"no more than the {max(stacks, default=len(tensors))} found",
                self.model_config.num_layers,
            )
            errors.raise_if_any()
        rows, known = {}, set()
        for item in fused_tensors.stored_tensors(self.arch, self.model_config, NAME).values():
            self._items |= dict.fromkeys(item.keys, item)
            self._parts[item.name] = parts = self._find(item)
            if not parts:
                errors.add(fused_name(item.name), "a tensor", "none")
            for part in parts:
                known.add(part.name)
                self._check_part(item, part, len(parts), rows, errors)
        if len(set(rows.values())) > 1:
            errors.add("vocabulary", "one number of rows", ", ".join(f"{n}: {size}" for n, size in rows.items()))
        for name in sorted(set(tensors) - known):
            if not name.startswith(OTHERS):
                errors.add(name, "no such tensor", f"{tensors[name].shape}")
        errors.raise_if_any(self._found)
        return next(iter(rows.values()), self.model_config.vocab_size)

    def _find(self, item: StoredTensor) -> tuple[StackedPart, ...]:
        layer = layer_index(item.keys[0])
        for name in dict.fromkeys((fused_name(item.name), item.name)):
            stacks = [] if layer is None else [StackedPart(stacked_name(name, layer), layer)]
            for part in (*stacks, StackedPart(name, None)):
                if part.name in self._contents.tensors:
                    return (part,)
                halves = tuple(replace(part, name=f"{part.name}_{end}") for end in "wv")
                if item.pack is Pack.STACKED and all(half.name in self._contents.tensors for half in halves):
                    return halves
        return ()

    def _check_part(
        self, item: StoredTensor, part: StackedPart, count: int, rows: dict[str, int], errors: ErrorCollector
    ) -> None:
        entry = self._entry(part)
        expected = item.shape(self.model_config) if count == 1 else item.params[0].shape(self.model_config)
        if part.layer is not None:
            expected = (self.model_config.num_layers, *expected)
        shape = entry.shape
        if item.params[0].axes[0].space == "vocab":
            rows[part.name] = shape[0] if shape else 0
            # What pads the vocabulary comes after it.
            shape = (min(rows[part.name], expected[0]), *shape[1:])
        if shape != expected:
            errors.add(part.name, f"shape {expected}", entry.shape)
        if not entry.dtype.is_floating_point or entry.dtype.itemsize == 1:
            errors.add(part.name, "floating-point numbers", entry.dtype)
        for state in (part.of(kind).name for kind in (*MOMENTS, *MASTERS)):
            other = self._contents.tensors.get(state, entry)
            if other.shape != entry.shape:
                errors.add(state, f"shape {entry.shape}", other.shape)

    def _has(self, state: str) -> bool:
        """True where the optimizer's tensors of a kind are there for every weight, in fp32."""
        return not self._lacking(state)

    def _lacking(self, state: str) -> list[str]:
        names = [part.of(state).name for parts in self._parts.values() for part in parts]
        found = self._contents.tensors
        return [name for name in names if name not in found or found[name].dtype != torch.float32]

    def _left(self) -> tuple[str, ...]:
        states = (name for name in self._contents.tensors if name.startswith(OTHERS))
        if self._moments or not any(states):
            return ()
        lacking = [name for kind in MOMENTS for name in self._lacking(kind)]
        if any(name in self._contents.tensors for name in lacking) or len(lacking) < len(MOMENTS) * len(self._parts):
            how = f"{lacking[0]} is not there in fp32"
        else:
            how = "not keyed by parameters: save it with --dist-ckpt-optim-fully-reshardable"
        return (f"optimizer state ({how})",)


def _check_backend(path: Path) -> None:
    found = config_json.load_config(path)
    if {name: found.get(name) for name in BACKEND} != BACKEND:
        hint = "Load and save it with a newer Megatron-core."
        raise CheckpointError(Problem(f"{path}", f"the backend torch_dist, version 1, {BACKEND}", found, hint))


def _step(path: Path, common: dict, moments: bool) -> int:
    """The optimizer's steps where its moments are read, else the iteration."""
    step = common.get("iteration", 0)
    if moments:
        noted = list(_counts(common.get("optimizer")))
        found = {adam_groups.parse_step(step) for step in noted}
        if len(found) != 1 or None in found:
            said = ", ".join(sorted(map(repr, noted))) or "none"
            raise CheckpointError(Problem(f"{path}", "one count of the optimizer's steps", said))
        (step,) = found
    if type(step) is not int or step < 0:
        raise CheckpointError(Problem(f"{path}", "iteration, a count", repr(step)))
    return step


def _groups(optimizer: object) -> tuple[dict, ...]:
    """Settings of the optimizer's groups. One with fp32 masters holds another one."""
    for _ in range(2):
        if isinstance(optimizer, Mapping) and "param_groups" not in optimizer:
            optimizer = optimizer.get("optimizer")
    return adam_groups.read_settings(optimizer.get("param_groups")) if isinstance(optimizer, Mapping) else ()


def _counts(tree: object, depth: int = 0) -> Iterator[object]:
    """Every count of steps in what an optimizer keeps besides its tensors."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name in ("step", "common_step"):
                yield value
            elif depth < 6:
                yield from _counts(value, depth + 1)
    elif isinstance(tree, list | tuple) and depth < 6:
        for value in tree:
            yield from _counts(value, depth + 1)


class MegatronCoreFormat(Format):
    name = NAME
    description = (
        f"{CONFIG} beside {METADATA_FILE} (Megatron-core's torch_dist), "
        f"or {iteration_folders.TRACKER} that names their folder"
    )
    stores_moments = True
    options = writer.MegatronCoreOptions

    def recognise(self, path: Path) -> bool:
        folder = iteration_folders.find_folder(path)
        return folder is not None and (folder / CONFIG).is_file() and (folder / METADATA_FILE).is_file()

    def open(self, path: Path) -> McoreReader:
        return McoreReader(path)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        writer.write(source, output, self.parse_options(options.extra))

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        return adam_groups.explain_unsupported(source.groups)
