"""Writes a distributed checkpoint for Megatron-core's own loader, chunk by chunk (format.py shows the files)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from megatron_ligo.arch.mcore_names import EXTRA_STATE
from megatron_ligo.arch.spec import key_indices, layer_index
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import (
    METADATA_FILE,
    ChunkedTensor,
    FileSpan,
    TensorChunk,
)
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import (
    BACKEND,
    COMMON_FILE,
    CONFIG_FILE,
    MASTER_STATES,
    layer_spec_names,
    list_places,
    optimizer_state_name,
)
from megatron_ligo.checkpoint.formats.megatron_lm import arguments, bridge_config
from megatron_ligo.checkpoint.formats.megatron_lm.run_config import FILE as RUN_CONFIG
from megatron_ligo.checkpoint.io import adam_groups, iteration_folders, tp_shards
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors

# States of the distributed optimizer keyed by parameter, as those of other optimizers are.
FULLY_RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class MegatronCoreOptions(adam_groups.AdamRates):
    vocab_divisible_by: int = setting(
        1, "pads the vocabulary to a multiple of it (default 1: Megatron-core pads as it loads)", low=1
    )
    bridge: bool = setting(
        False, "for Megatron-Bridge's AutoBridge: adds run_config.yaml, in iter_N (default false: release)"
    )


def write_checkpoint(source: Reader, output: Output, options: MegatronCoreOptions) -> None:
    """Writes one file of global tensors per layer, then the metadata. Megatron-core shards tensors as it loads."""
    model_config, multiple = source.model_config, options.vocab_divisible_by
    padded_vocab_size = -(-model_config.vocab_size // multiple) * multiple
    # AutoBridge looks for iter_0000000, which Megatron-LM does not load.
    folder = f"iter_{source.step:07d}" if options.bridge else iteration_folders.RELEASE
    model_record.write(source, output)
    written = _write_tensors(source, output, folder, padded_vocab_size)
    dtype = written.most_common_dtype()
    if options.bridge:
        text = bridge_config.to_run_config(model_config, padded_vocab_size, dtype)
        output.write_text(f"{folder}/{RUN_CONFIG}", text)
    args = arguments.to_megatron_args(model_config, 1, 1, padded_vocab_size, dtype, source.step)
    output.write_torch(
        f"{folder}/{COMMON_FILE}",
        {
            "iteration": source.step,
            "checkpoint_version": arguments.CHECKPOINT_VERSION,
            "args": args,
            "content_metadata": {"singleton_local_shards": False, **(FULLY_RESHARDABLE if source.has_moments else {})},
            **({"optimizer": _build_common_optimizer(source, options.rates())} if source.has_moments else {}),
        },
    )
    metadata = dcp_metadata.pickle_metadata(written.tensors(), written.objects)
    output.write_file(f"{folder}/{METADATA_FILE}", lambda path: path.write_bytes(metadata))
    config = {**BACKEND, "common_backend": "torch", "common_backend_version": 1}
    output.write_json(f"{folder}/{CONFIG_FILE}", config)
    output.write_text(iteration_folders.TRACKER, str(source.step) if options.bridge else iteration_folders.RELEASE)


def _build_common_optimizer(source: Reader, rates: dict[str, object]) -> dict[str, object]:
    """Returns the optimizer's state dict without tensors, for optimizers with and without fp32 master weights.

    Those with master weights read the inner `optimizer`. torch's Adam reads the step count from its state,
    Transformer Engine's from its param groups.
    """
    param_groups = adam_groups.to_megatron_groups(source.groups, rates)
    step = LazyTensor((), torch.float32, lambda: torch.tensor(float(source.step)))
    return {
        "state": {"common_step": step},
        "param_groups": param_groups,
        "optimizer": {"param_groups": [{**group, adam_groups.STEP: source.step} for group in param_groups]},
        "param_state_sharding_type": FULLY_RESHARDABLE["distrib_optim_sharding_type"],
    }


@dataclass
class WrittenTensors:
    """Where each tensor's chunks and each object were written, by name. sizes: numbers of layers and of experts."""

    sizes: tuple[int, int]
    chunks: dict[str, list[TensorChunk]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    objects: dict[str, FileSpan] = field(default_factory=dict)

    def add(self, name: str, indices: tuple[int, ...], tensor: LazyTensor, span: FileSpan) -> None:
        """Adds a chunk: a layer of a stacked tensor, an expert of a layer, or without indices a whole tensor."""
        if self.dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
            found = f"{self.dtypes[name]} and {tensor.dtype}"
            raise CheckpointError(Problem(name, "one dtype in all layers", found, "Choose one with --dtype."))
        offset = (*indices, *(0,) * (len(tensor.shape) - len(indices)))
        self.chunks.setdefault(name, []).append(TensorChunk(offset, tensor.shape, *span))
        self.depths[name] = len(indices)

    def tensors(self) -> dict[str, ChunkedTensor]:
        return {
            name: ChunkedTensor(self._global_shape(name), self.dtypes[name], tuple(chunks))
            for name, chunks in self.chunks.items()
        }

    def most_common_dtype(self) -> torch.dtype:
        dtypes = list(self.dtypes.values())
        return max(set(dtypes), key=dtypes.count)

    def _global_shape(self, name: str) -> tuple[int, ...]:
        depth = self.depths[name]
        return (*self.sizes[:depth], *self.chunks[name][0].shape[depth:])


def _write_tensors(source: Reader, output: Output, folder: str, padded_vocab_size: int) -> WrittenTensors:
    """Writes a file for what precedes the layers, one per layer, and one for what follows them."""
    padded_config = replace(source.model_config, vocab_size=padded_vocab_size)
    shards = tp_shards.TpShards(source, 1, padded_config)
    stored_tensors = fused_tensors.stored_tensors(source.arch, source.model_config, "mcore").values()
    kinds = (WEIGHT, *MOMENTS) if source.has_moments else (WEIGHT,)
    sizes = source.model_config.num_layers, source.model_config.num_experts
    written = WrittenTensors(sizes)
    groups = groupby(stored_tensors, lambda stored: layer_index(stored.keys[0]))
    for number, (_, group) in enumerate(groups):
        # Experts of a layer have one name: in the archive each is named by its own number.
        places, tensors = {}, {}
        for stored in group:
            # Of a parameter that the first layer lacks there is no whole stack.
            skips_first = stored.params[0].skips_first_layer
            places[stored.name] = () if skips_first else key_indices(stored.keys[0])
            for kind in kinds:
                tensor = _add_leading_dims(shards.lazy_shard(stored, 0, kind), len(places[stored.name]))
                tensors[_state_name(stored.name, kind)] = tensor
        file = f"__0_{number}.distcp"
        spans = output.write_torch_archives(f"{folder}/{file}", {**tensors, EXTRA_STATE: [None]})
        for local_name, indices in places.items():
            for name in _written_names(local_name, indices, source):
                for kind in kinds:
                    archive = _state_name(local_name, kind)
                    written.add(_state_name(name, kind), indices, tensors[archive], FileSpan(file, *spans[archive]))
                if source.has_moments and tensors[local_name].dtype == torch.float32:
                    # fp32 weights are their own master weights: the same bytes under a second name.
                    span = FileSpan(file, *spans[local_name])
                    for state in MASTER_STATES:
                        written.add(optimizer_state_name(name, state), indices, tensors[local_name], span)
                for module in _extra_state_names(name, indices, sizes):
                    written.objects[module] = FileSpan(file, *spans[EXTRA_STATE])
    return written


def _state_name(name: str, kind: str) -> str:
    return name if kind == WEIGHT else optimizer_state_name(name, kind)


def _written_names(local_name: str, indices: tuple[int, ...], source: Reader) -> tuple[str, ...]:
    """Returns the names of a tensor: before experts, a norm has those of both layer specs."""
    names = [list_places(name, indices)[0][0] for name in layer_spec_names(local_name)]
    return tuple(names if source.model_config.num_experts else names[:1])


def _add_leading_dims(tensor: LazyTensor, count: int) -> LazyTensor:
    """Returns the tensor with leading dims of size 1: its place in a stacked tensor."""
    leading = (1,) * count
    return replace(tensor, shape=(*leading, *tensor.shape), make=lambda: tensor.make()[(None,) * count])


def _extra_state_names(name: str, indices: tuple[int, ...], sizes: tuple[int, int]) -> Iterator[str]:
    """Yields names of the (empty) fp8 states that Megatron-core's modules load.

    Local layers have them in their linears, Transformer Engine's in the attention core and the final norm as well.
    """
    # A norm inside a linear ends in `layer_norm_weight` and has no state of its own.
    if not name.endswith(".weight") or not (indices or name.endswith("final_layernorm.weight")):
        return
    module = name.removesuffix("weight")
    offsets, shape = (".".join(map(str, numbers)) for numbers in (indices or (0,), sizes[: len(indices)] or (1,)))
    yield f"{module}{EXTRA_STATE}/shard_{offsets}_{shape}"
    if "linear_qkv" in module:
        yield f"{module.replace('linear_qkv', 'core_attention')}{EXTRA_STATE}/shard_{offsets}_{shape}"
