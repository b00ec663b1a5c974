"""Writes a distributed checkpoint for Megatron-core's own loader, a chunk at a time (mcore.py shows the layout)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby, product

import torch

from megatron_ligo.arch.spec import layer_index
from megatron_ligo.checkpoint import model_record
from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata
from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA_FILE, ChunkedTensor, TensorChunk
from megatron_ligo.checkpoint.formats.megatron_core.tensor_names import (
    BACKEND,
    COMMON,
    CONFIG,
    EXTRA_STATE,
    MASTERS,
    fused_name,
    stacked_name,
    state_name,
)
from megatron_ligo.checkpoint.formats.megatron_lm import arguments
from megatron_ligo.checkpoint.io import adam_groups, iteration_folders, tp_shards
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.config.typed_toml import setting
from megatron_ligo.sharding import fused_tensors

Span = tuple[str, int, int]  # file, offset, length
FORM = "mcore"
# The distributed optimizer's tensors are keyed by parameters, as those of the others are.
RESHARDABLE = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class MegatronCoreOptions(adam_groups.AdamRates):
    vocab_divisible_by: int = setting(
        1, "pads the vocabulary to a multiple of it (default 1: Megatron-core pads as it loads)", low=1
    )


def write(source: Reader, output: Output, options: MegatronCoreOptions) -> None:
    """The tensors in a file for each layer, then what names their places. Megatron-core cuts them as it loads."""
    multiple, rates = options.vocab_divisible_by, options.rates()
    rows = -(-source.model_config.vocab_size // multiple) * multiple
    folder = iteration_folders.folder_name(0)
    model_record.write(source, output)
    written = _write_files(source, output, folder, rows)
    args = arguments.to_megatron_args(source.model_config, 1, 1, rows, written.common_dtype(), source.step)
    output.write_torch(
        f"{folder}/{COMMON}",
        {
            "iteration": source.step,
            "checkpoint_version": arguments.CHECKPOINT_VERSION,
            "args": args,
            "content_metadata": {"singleton_local_shards": False, **(RESHARDABLE if source.has_moments else {})},
            **({"optimizer": _optimizer(source, rates)} if source.has_moments else {}),
        },
    )
    metadata = dcp_metadata.pickle_metadata(written.entries(), written.objects)
    output.write_file(f"{folder}/{METADATA_FILE}", lambda path: path.write_bytes(metadata))
    output.write_json(f"{folder}/{CONFIG}", {**BACKEND, "common_backend": "torch", "common_backend_version": 1})
    iteration_folders.write_tracker(output, 0)


def _optimizer(source: Reader, rates: dict[str, object]) -> dict[str, object]:
    """What Adam keeps besides its tensors, as an optimizer of fp32 weights has it, and (inside) as those that keep fp32
    masters have it: torch's Adam counts in its state, that of Transformer Engine in its groups."""
    groups = adam_groups.to_megatron_groups(source.groups, rates)
    count = LazyTensor((), torch.float32, lambda: torch.tensor(float(source.step)))
    return {
        "state": {"common_step": count},
        "param_groups": groups,
        "optimizer": {"param_groups": [{**group, adam_groups.STEP: source.step} for group in groups]},
        "param_state_sharding_type": RESHARDABLE["distrib_optim_sharding_type"],
    }


@dataclass
class WrittenTensors:
    """What lies where: a tensor's chunks by its name, and what is no tensor."""

    num_layers: int
    chunks: dict[str, list[TensorChunk]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    objects: dict[str, Span] = field(default_factory=dict)

    def add(self, name: str, layer: int | None, later: LazyTensor, span: Span) -> None:
        if self.dtypes.setdefault(name, later.dtype) != later.dtype:
            found = f"{self.dtypes[name]} and {later.dtype}"
            raise CheckpointError(Problem(name, "one dtype in all layers", found, "Choose one with --dtype."))
        rest = (0,) * len(later.shape)
        offset = rest if layer is None else (layer, *rest[1:])
        self.chunks.setdefault(name, []).append(TensorChunk(offset, later.shape, *span))
        if layer is not None:
            self.stacked.add(name)

    def entries(self) -> dict[str, ChunkedTensor]:
        return {
            name: ChunkedTensor(self._shape(name), self.dtypes[name], tuple(self.chunks[name])) for name in self.chunks
        }

    def common_dtype(self) -> torch.dtype:
        """That of most tensors."""
        found = list(self.dtypes.values())
        return max(set(found), key=found.count)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.chunks[name][0].shape
        return (self.num_layers, *shape[1:]) if name in self.stacked else shape


def _write_files(source: Reader, output: Output, folder: str, rows: int) -> WrittenTensors:
    """Before the layers, each layer, after the layers: one file each."""
    pieces = tp_shards.TpShards(source, 1, replace(source.model_config, vocab_size=rows))
    items = fused_tensors.stored_tensors(source.arch, source.model_config, FORM).values()
    kinds = (WEIGHT, *MOMENTS) if source.has_moments else (WEIGHT,)
    written = WrittenTensors(source.model_config.num_layers)
    for number, (layer, group) in enumerate(groupby(items, lambda item: layer_index(item.keys[0]))):
        trees, names = {}, []
        for item in group:
            name = fused_name(item.name) if layer is None else stacked_name(fused_name(item.name), layer)
            names.append(name)
            for kind in kinds:
                later = pieces.lazy_shard(item, 0, kind)
                trees[name if kind == WEIGHT else state_name(name, kind)] = later if layer is None else _stacked(later)
        file = f"__0_{number}.distcp"
        spans = output.write_torch_archives(f"{folder}/{file}", {**trees, EXTRA_STATE: [None]})
        for name, later in trees.items():
            written.add(name, layer, later, (file, *spans[name]))
        full = [name for name in names if source.has_moments and trees[name].dtype == torch.float32]
        for name, kind in product(full, MASTERS):
            # The masters are the weights: the same bytes by another name.
            written.add(state_name(name, kind), layer, trees[name], (file, *spans[name]))
        for name in _extra_states(names, layer, source.model_config.num_layers):
            written.objects[name] = (file, *spans[EXTRA_STATE])
    return written


def _stacked(later: LazyTensor) -> LazyTensor:
    """One layer of a stack."""
    return replace(later, shape=(1, *later.shape), make=lambda: later.make()[None])


def _extra_states(names: list[str], layer: int | None, num_layers: int) -> Iterator[str]:
    """What modules keep for fp8 (here: nothing), which Megatron-core asks for by these names.

    Its local layers have it in their linears, Transformer Engine's in the attention and the last norm too.
    """
    if layer is None:
        modules = [name.removesuffix("weight") for name in names if name.endswith("final_layernorm.weight")]
        shard = "shard_0_1"
    else:
        # The norms inside linears have no such name.
        modules = [name.removesuffix("weight") for name in names if name.endswith(".weight")]
        modules += [name.replace("linear_qkv", "core_attention") for name in modules if "linear_qkv" in name]
        shard = f"shard_{layer}_{num_layers}"
    for module in modules:
        yield f"{module}{EXTRA_STATE}/{shard}"
