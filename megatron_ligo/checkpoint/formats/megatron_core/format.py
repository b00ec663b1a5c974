"""Megatron-core's distributed checkpoints (torch_dist): global tensors in chunks, loadable at any TP and PP layout.

    DIR/latest_checkpointed_iteration.txt     the iteration's folder (io/iteration_folders.py)
    DIR/iter_0000100/metadata.json            the backend (torch_dcp and Megatron-FSDP's fsdp_dtensor have none)
    DIR/iter_0000100/.metadata                every tensor and its chunks (dcp_metadata.py)
    DIR/iter_0000100/__0_0.distcp             archives of torch.save, one per chunk
    DIR/iter_0000100/common.pt                iteration, run arguments and optimizer settings (or an object of the
                                              checkpoint: tensor_names.py)

Layers are stacked into tensors of shape (layers, ...), or stored one by one; a layer's experts too, which Megatron-core
names alike whether it computes them one after another or as a grouped product. Norms have Transformer Engine's names.
NeMo's DIR has the folder of the tensors as DIR/weights, beside DIR/context/model.yaml; names of its parameters, and of
Megatron-FSDP's, are wrapped (wrappers.py).
Adam's tensors have the weight's name after `optimizer.state.exp_avg.` and the like; its step count and the settings of
its param groups are in common.pt.

Megatron-core's own layers are pre-norm and sequential. Post-norm models (BERT) and parallel blocks (GPT-NeoX) are
stored, but none of its models computes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo.arch.mcore_names import to_fused_name
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Pack, key_indices
from megatron_ligo.checkpoint.format import Format, WriteOptions
from megatron_ligo.checkpoint.formats.megatron_core import backend, common_state, dcp_metadata, wrappers, writer
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import (
    METADATA_FILE,
    ChunkedTensor,
    TensorChunk,
)
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import (
    COMMON_FILE,
    CONFIG_FILE,
    EMBEDDING,
    MASTER_STATES,
    layer_spec_names,
    list_places,
    optimizer_state_name,
)
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, rope_arguments, run_config
from megatron_ligo.checkpoint.io import adam_groups, iteration_folders, torch_files, tp_shards
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader, TensorInfo
from megatron_ligo.checkpoint.source_keys import NO_KEYS, AcceptedKeys
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.sharding import fused_tensors
from megatron_ligo.sharding.fused_tensors import StoredTensor

NAME = "mcore"
# Prefixes of names outside of the model.
NON_MODEL_PREFIXES = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")
# Suffixes of the gate and up projections if the MLP's first linear is stored as two tensors.
GLU_SUFFIXES = ("_w", "_v")


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the checkpoint, or one layer (or one expert of one layer) of a stacked tensor.

    index: its place in the leading dims; leading: their sizes.
    """

    name: str
    index: tuple[int, ...] = ()
    leading: tuple[int, ...] = ()

    def optimizer_state(self, state: str) -> TensorSource:
        """Returns the source of this weight's optimizer state, such as exp_avg."""
        return replace(self, name=optimizer_state_name(self.name, state))


class McoreReader(Reader):
    """Reads canonical tensors from memory-mapped chunks. Only tensors in several chunks are assembled in memory."""

    format = NAME

    def __init__(self, path: Path, accepted: AcceptedKeys = NO_KEYS):
        self.path = path
        self._folder = self._find_folder(path)
        self._contents = wrappers.unwrap(dcp_metadata.read_metadata(self._folder), self._folder)
        self._checked_chunks: set[TensorChunk] = set()
        self._chunks: dict[str, dict[tuple[int, ...], list[TensorChunk]]] = {}
        common = common_state.load(self._folder, self._contents)
        embedding = self._contents.tensors.get(EMBEDDING)
        rows = embedding.shape[0] if embedding and embedding.shape else None
        self.model_config, self.carried, self.files = arguments.read_model_config(
            self._folder, common.get("args"), accepted, rows
        )
        self.run_arguments = arguments.plain_arguments(common.get("args"))
        self._stored_by_key: dict[str, StoredTensor] = {}
        self._sources: dict[str, tuple[TensorSource, ...]] = {}
        self._padded_vocab_size = self._check()
        is_padded = self._padded_vocab_size > self.model_config.vocab_size
        self.layout = {"padded_vocab": self._padded_vocab_size} if is_padded else {}
        self._master_state = next((state for state in MASTER_STATES if self._has_state(state)), None)
        self._has_moments = all(self._has_state(kind) for kind in MOMENTS)
        self.unread = self._describe_unread()
        self.step = common_state.read_step(self._folder / COMMON_FILE, common, self._has_moments)
        self.groups = common_state.read_groups(common.get("optimizer")) if self._has_moments else ()

    @property
    def has_moments(self) -> bool:
        return self._has_moments

    def _find_folder(self, path: Path) -> Path:
        """Returns the folder of the tensors. Raises CheckpointError for one that this format does not read."""
        folder = run_config.find_nemo_weights(path) or iteration_folders.require_folder(path)
        backend.check_backend(folder / CONFIG_FILE)
        return folder

    def info(self, key: str) -> TensorInfo:
        source = self._sources[self._stored_by_key[key].name][0]
        return TensorInfo(self.param(key).shape(self.model_config), self._tensor(self._weight_source(source)).dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        stored = self._stored_by_key[key]
        sources = [
            self._weight_source(source) if kind == WEIGHT else source.optimizer_state(kind)
            for source in self._sources[stored.name]
        ]
        if len(sources) > 1:
            return self._assemble(sources[stored.keys.index(key)])
        padded_config = replace(self.model_config, vocab_size=self._padded_vocab_size)
        (source,) = sources
        return tp_shards.join_shards(
            stored, key, [self._assemble(source)], padded_config, self.model_config, source.name
        )

    def _weight_source(self, source: TensorSource) -> TensorSource:
        """Returns the source of the fp32 master weight, if there is one."""
        return source.optimizer_state(self._master_state) if self._master_state else source

    def _tensor(self, source: TensorSource) -> ChunkedTensor:
        return self._contents.tensors[source.name]

    def _assemble(self, source: TensorSource) -> Tensor:
        """Reads a whole tensor, or a layer of a stacked one; a view of the file if it is in a single chunk."""
        tensor, index = self._tensor(source), source.index
        chunks = self._chunks_by_index(source)[index]
        if len(chunks) == 1:
            return self._map_chunk(tensor, chunks[0], index)
        dims = slice(len(index), None)
        whole = torch.empty(tensor.shape[dims], dtype=tensor.dtype)
        for chunk in chunks:
            target = whole
            for dim, (start, size) in enumerate(zip(chunk.offset[dims], chunk.shape[dims], strict=True)):
                target = target.narrow(dim, start, size)
            target.copy_(self._map_chunk(tensor, chunk, index))
        return whole

    def _chunks_by_index(self, source: TensorSource) -> Mapping[tuple[int, ...], list[TensorChunk]]:
        """Returns the chunks of a tensor that hold each index of its leading dims."""
        if source.name not in self._chunks:
            chunks = self._chunks[source.name] = {}
            for chunk in self._tensor(source).chunks:
                leading = zip(chunk.offset, chunk.shape, source.index, strict=False)
                for index in product(*(range(start, start + size) for start, size, _ in leading)):
                    chunks.setdefault(index, []).append(chunk)
        return self._chunks[source.name]

    def _map_chunk(self, tensor: ChunkedTensor, chunk: TensorChunk, index: tuple[int, ...]) -> Tensor:
        path = self._folder / chunk.file
        is_first = chunk not in self._checked_chunks
        block = torch_files.map_tensor(path, chunk.file_offset, chunk.file_length, check_bytes=is_first)
        self._checked_chunks.add(chunk)
        if (tuple(block.shape), block.dtype) != (chunk.shape, tensor.dtype):
            found = f"{block.dtype} {tuple(block.shape)}"
            raise CheckpointError(Problem(f"{path} at {chunk.file_offset}", f"{tensor.dtype} {chunk.shape}", found))
        for number, offset in zip(index, chunk.offset, strict=False):
            block = block[number - offset]
        return block

    def _iter_chunks(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every floating-point chunk with a name for error messages."""
        for name, tensor in self._contents.tensors.items():
            for chunk in tensor.chunks if tensor.dtype.is_floating_point else ():
                yield f"{name} from {chunk.offset} on", self._map_chunk(tensor, chunk, ())

    def _check(self) -> int:
        """Checks that every tensor is there with its shape and dtype, and no others.

        Returns the padded vocabulary size.
        """
        tensors = self._contents.tensors
        errors = ErrorCollector(f"{self._folder} does not hold the model of its config", CheckpointError)
        stack_sizes = [
            tensor.shape[0] for name, tensor in tensors.items() if re.search(r"\.layers\.\D", name) and tensor.shape
        ]
        if self.model_config.num_layers > max(len(tensors), *stack_sizes, 0):
            # Bounds the work that a false num_layers can cause.
            expected = f"at most {max(stack_sizes, default=len(tensors))}, from the tensors"
            errors.add("num_layers", expected, self.model_config.num_layers)
            errors.raise_if_any()
        sizes = {size for tensor in tensors.values() for size in tensor.shape}
        if self.model_config.num_experts > max(len(tensors), *sizes, 0):
            errors.add("num_experts", "at most the size of a tensor", self.model_config.num_experts)
            errors.raise_if_any()
        vocab_rows: dict[str, int] = {}
        names = set()
        for stored in fused_tensors.stored_tensors(self.arch, self.model_config, NAME).values():
            self._stored_by_key |= dict.fromkeys(stored.keys, stored)
            self._sources[stored.name] = sources = self._find_sources(stored)
            if not sources:
                errors.add(to_fused_name(stored.name), "a tensor", "none")
            for source in sources:
                if source.name not in names:
                    self._check_source(stored, source, len(sources), vocab_rows, errors)
                names |= {source.name, *self._find_twins(stored, source)}
        if len(set(vocab_rows.values())) > 1:
            found = ", ".join(f"{name}: {rows}" for name, rows in vocab_rows.items())
            errors.add("vocabulary", "one number of rows", found)
        for name in sorted(set(tensors) - names):
            if not name.startswith(NON_MODEL_PREFIXES):
                errors.add(name, "no such tensor", f"{tensors[name].shape}")
        errors.raise_if_any(self._iter_chunks)
        return next(iter(vocab_rows.values()), self.model_config.vocab_size)

    def _find_sources(self, stored: StoredTensor) -> tuple[TensorSource, ...]:
        """Returns where a tensor is stored: one source, two for separate gate and up projections, () if missing."""
        indices = key_indices(stored.keys[0])
        sizes = self.model_config.num_layers, self.model_config.num_experts
        for name in layer_spec_names(stored.name):
            for place, first in list_places(name, indices):
                source = TensorSource(place, indices[first:], sizes[first : len(indices)])
                if source.name in self._contents.tensors:
                    return (source,)
                halves = tuple(replace(source, name=f"{source.name}{suffix}") for suffix in GLU_SUFFIXES)
                if stored.pack is Pack.STACKED and all(half.name in self._contents.tensors for half in halves):
                    return halves
        return ()

    def _find_twins(self, stored: StoredTensor, source: TensorSource) -> Iterator[str]:
        """Yields the other layer spec's name of a tensor if it names the same bytes."""
        names = layer_spec_names(stored.name)
        for name in names if len(names) > 1 else ():
            for twin, _ in list_places(name, key_indices(stored.keys[0])):
                tensor = self._contents.tensors.get(twin)
                if tensor and tensor.chunks == self._tensor(source).chunks:
                    yield twin

    def _check_source(
        self,
        stored: StoredTensor,
        source: TensorSource,
        num_sources: int,
        vocab_rows: dict[str, int],
        errors: ErrorCollector,
    ) -> None:
        """Checks shape and dtype of a tensor and its optimizer states. Adds its number of rows to `vocab_rows`."""
        tensor, param = self._tensor(source), stored.params[0]
        expected = stored.shape(self.model_config) if num_sources == 1 else param.shape(self.model_config)
        expected = (*source.leading, *expected)
        shape = tensor.shape
        if param.axes[0].space == "vocab":
            vocab_rows[source.name] = shape[0] if shape else 0
            # Padding rows follow the vocabulary.
            shape = (min(vocab_rows[source.name], expected[0]), *shape[1:])
        if shape != expected:
            errors.add(source.name, f"shape {expected}", tensor.shape)
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize == 1:
            errors.add(source.name, "a floating-point dtype of 16 bits or more", tensor.dtype)
        for state in (*MOMENTS, *MASTER_STATES):
            name = source.optimizer_state(state).name
            state_tensor = self._contents.tensors.get(name, tensor)
            if state_tensor.shape != tensor.shape:
                errors.add(name, f"shape {tensor.shape}", state_tensor.shape)

    def _has_state(self, state: str) -> bool:
        """Returns whether every weight has a tensor of the optimizer state, in fp32."""
        return not self._find_missing(state)

    def _find_missing(self, state: str) -> list[str]:
        """Returns names of an optimizer state's tensors that are missing or not in fp32."""
        names = [source.optimizer_state(state).name for sources in self._sources.values() for source in sources]
        tensors = self._contents.tensors
        return [name for name in names if name not in tensors or tensors[name].dtype != torch.float32]

    def _describe_unread(self) -> tuple[str, ...]:
        has_non_model = any(name.startswith(NON_MODEL_PREFIXES) for name in self._contents.tensors)
        if self._has_moments or not has_non_model:
            return ()
        missing = [name for kind in MOMENTS for name in self._find_missing(kind)]
        is_by_param = any(name in self._contents.tensors for name in missing)
        if is_by_param or len(missing) < len(MOMENTS) * len(self._sources):
            reason = f"{missing[0]} is missing or not in fp32"
        else:
            reason = "not keyed by parameter: save it with --dist-ckpt-optim-fully-reshardable"
        return (f"optimizer state ({reason})",)


class MegatronCoreFormat(Format):
    name = NAME
    description = (
        f"{CONFIG_FILE} beside {METADATA_FILE} (Megatron-core's torch_dist), "
        f"or {iteration_folders.TRACKER} that names their folder"
    )
    stores_moments = True
    options = writer.MegatronCoreOptions

    def recognise(self, path: Path) -> bool:
        folder = run_config.find_nemo_weights(path) or iteration_folders.find_folder(path)
        return folder is not None and backend.is_distributed(folder)

    def open(self, path: Path, accepted: AcceptedKeys) -> McoreReader:
        return McoreReader(path, accepted)

    def write(self, source: Reader, output: Output, options: WriteOptions) -> None:
        writer.write_checkpoint(source, output, self.parse_options(options.extra))

    def reader_warning(self, model_config: ModelConfig) -> str:
        return rope_arguments.explain_reading(model_config)

    def unsupported_moments(self, source: Reader, options: WriteOptions) -> str:
        return adam_groups.explain_unsupported(source.groups)
