"""Writes a distributed checkpoint for Megatron-core's own loader, chunk by chunk (format.py shows the files)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, product

import torch

from megatron_ligo.arch.mcore_names import EXTRA_STATE, to_fused_name
from megatron_ligo.arch.spec import layer_index
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
    optimizer_state_name,
    stacked_name,
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
    """Where each tensor's chunks and each object were written, by name."""

    num_layers: int
    chunks: dict[str, list[TensorChunk]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    objects: dict[str, FileSpan] = field(default_factory=dict)

    def add(self, name: str, layer: int | None, tensor: LazyTensor, span: FileSpan) -> None:
        """Adds a chunk: one layer of a stacked tensor, or a whole tensor if layer is None."""
        if self.dtypes.setdefault(name, tensor.dtype) != tensor.dtype:
            found = f"{self.dtypes[name]} and {tensor.dtype}"
            raise CheckpointError(Problem(name, "one dtype in all layers", found, "Choose one with --dtype."))
        zeros = (0,) * len(tensor.shape)
        offset = zeros if layer is None else (layer, *zeros[1:])
        self.chunks.setdefault(name, []).append(TensorChunk(offset, tensor.shape, *span))
        if layer is not None:
            self.stacked.add(name)

    def tensors(self) -> dict[str, ChunkedTensor]:
        return {
            name: ChunkedTensor(self._global_shape(name), self.dtypes[name], tuple(chunks))
            for name, chunks in self.chunks.items()
        }

    def most_common_dtype(self) -> torch.dtype:
        dtypes = list(self.dtypes.values())
        return max(set(dtypes), key=dtypes.count)

    def _global_shape(self, name: str) -> tuple[int, ...]:
        shape = self.chunks[name][0].shape
        return (self.num_layers, *shape[1:]) if name in self.stacked else shape


def _write_tensors(source: Reader, output: Output, folder: str, padded_vocab_size: int) -> WrittenTensors:
    """Writes a file for what precedes the layers, one per layer, and one for what follows them."""
    padded_config = replace(source.model_config, vocab_size=padded_vocab_size)
    shards = tp_shards.TpShards(source, 1, padded_config)
    stored_tensors = fused_tensors.stored_tensors(source.arch, source.model_config, "mcore").values()
    kinds = (WEIGHT, *MOMENTS) if source.has_moments else (WEIGHT,)
    written = WrittenTensors(source.model_config.num_layers)
    groups = groupby(stored_tensors, lambda stored: layer_index(stored.keys[0]))
    for number, (layer, group) in enumerate(groups):
        tensors, names = {}, []
        for stored in group:
            name = to_fused_name(stored.name)
            name = name if layer is None else stacked_name(name, layer)
            names.append(name)
            for kind in kinds:
                tensor = shards.lazy_shard(stored, 0, kind)
                stored_name = name if kind == WEIGHT else optimizer_state_name(name, kind)
                tensors[stored_name] = tensor if layer is None else _add_layer_dim(tensor)
        file = f"__0_{number}.distcp"
        spans = output.write_torch_archives(f"{folder}/{file}", {**tensors, EXTRA_STATE: [None]})
        for name, tensor in tensors.items():
            written.add(name, layer, tensor, FileSpan(file, *spans[name]))
        fp32_names = [name for name in names if source.has_moments and tensors[name].dtype == torch.float32]
        for name, state in product(fp32_names, MASTER_STATES):
            # fp32 weights are their own master weights: the same bytes under a second name.
            written.add(optimizer_state_name(name, state), layer, tensors[name], FileSpan(file, *spans[name]))
        for name in _extra_state_names(names, layer, source.model_config.num_layers):
            written.objects[name] = FileSpan(file, *spans[EXTRA_STATE])
    return written


def _add_layer_dim(tensor: LazyTensor) -> LazyTensor:
    """Returns the tensor with a leading dim of size 1: one layer of a stacked tensor."""
    return replace(tensor, shape=(1, *tensor.shape), make=lambda: tensor.make()[None])


def _extra_state_names(names: list[str], layer: int | None, num_layers: int) -> Iterator[str]:
    """Yields names of the (empty) fp8 states that Megatron-core's modules load.

    Local layers have them in their linears, Transformer Engine's in the attention core and the final norm as well.
    """
    if layer is None:
        modules = [name.removesuffix("weight") for name in names if name.endswith("final_layernorm.weight")]
        shard = "shard_0_1"
    else:
        # A norm inside a linear ends in `layer_norm_weight` and has no state of its own.
        modules = [name.removesuffix("weight") for name in names if name.endswith(".weight")]
        modules += [name.replace("linear_qkv", "core_attention") for name in modules if "linear_qkv" in name]
        shard = f"shard_{layer}_{num_layers}"
    for module in modules:
        yield f"{module}{EXTRA_STATE}/{shard}"
