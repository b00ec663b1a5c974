"""Writes a distributed checkpoint for Megatron-core's own loader, a chunk at a time (mcore.py shows the layout)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from megatron_ligo import packing
from megatron_ligo.arch.rows import layer_of
from megatron_ligo.errors import CheckpointError, ConfigError, message
from megatron_ligo.formats import dcp_metadata, iterations, megatron_args, ranks, record
from megatron_ligo.formats.base import Reader, WriteOptions
from megatron_ligo.formats.dcp_metadata import METADATA, Chunk, Entry
from megatron_ligo.formats.layouts import Later
from megatron_ligo.formats.mcore_names import BACKEND, COMMON, CONFIG, EXTRA_STATE, fused_name, stacked_name
from megatron_ligo.formats.output import Output

Span = tuple[str, int, int]  # file, offset, length


def write(source: Reader, out: Output, options: WriteOptions) -> None:
    """The weights in a file for each layer, then what names their places. Megatron-core cuts them as it loads."""
    rows = _rows(source.dims.vocab_size, options)
    folder = iterations.folder_name(0)
    record.write(source, out)
    written = _write_files(source, out, folder, rows)
    args = megatron_args.args_of(source.dims, 1, 1, rows, written.common_dtype(), source.step)
    out.torch(
        f"{folder}/{COMMON}",
        {
            "iteration": source.step,
            "checkpoint_version": megatron_args.CHECKPOINT_VERSION,
            "args": args,
            "content_metadata": {"singleton_local_shards": False},
        },
    )
    metadata = dcp_metadata.pickled(written.entries(), written.objects)
    out.file(f"{folder}/{METADATA}", lambda path: path.write_bytes(metadata))
    out.json(f"{folder}/{CONFIG}", {**BACKEND, "common_backend": "torch", "common_backend_version": 1})
    iterations.write_tracker(out, 0)


def _rows(vocab_size: int, options: WriteOptions) -> int:
    multiple = options.extra.get("vocab_divisible_by", 1)
    if type(multiple) is not int or multiple < 1:
        raise ConfigError(message("vocab_divisible_by", "a positive whole number", repr(multiple)))
    return -(-vocab_size // multiple) * multiple


@dataclass
class Written:
    """What lies where: a tensor's chunks by its name, and what is no tensor."""

    num_layers: int
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    stacked: set[str] = field(default_factory=set)
    objects: dict[str, Span] = field(default_factory=dict)

    def add(self, name: str, layer: int | None, later: Later, span: Span) -> None:
        if self.dtypes.setdefault(name, later.dtype) != later.dtype:
            found = f"{self.dtypes[name]} and {later.dtype}"
            raise CheckpointError(message(name, "one dtype in all layers", found, "Choose one with --dtype."))
        rest = (0,) * len(later.shape)
        offset = rest if layer is None else (layer, *rest[1:])
        self.chunks.setdefault(name, []).append(Chunk(offset, later.shape, *span))
        if layer is not None:
            self.stacked.add(name)

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(self._shape(name), self.dtypes[name], tuple(self.chunks[name])) for name in self.chunks}

    def common_dtype(self) -> torch.dtype:
        """That of most tensors."""
        found = list(self.dtypes.values())
        return max(set(found), key=found.count)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.chunks[name][0].shape
        return (self.num_layers, *shape[1:]) if name in self.stacked else shape


def _write_files(source: Reader, out: Output, folder: str, rows: int) -> Written:
    """Before the layers, each layer, after the layers: one file each."""
    pieces = ranks.Pieces(source, 1, replace(source.dims, vocab_size=rows))
    items = packing.stored(source.arch, source.dims, "mcore").values()
    written = Written(source.dims.num_layers)
    for number, (layer, group) in enumerate(groupby(items, lambda item: layer_of(item.keys[0]))):
        trees = {}
        for item in group:
            later, name = pieces.later(item, 0), fused_name(item.name)
            trees |= {name: later} if layer is None else {stacked_name(name, layer): _stacked(later)}
        file = f"__0_{number}.distcp"
        spans = out.torch_archives(f"{folder}/{file}", {**trees, EXTRA_STATE: [None]})
        for name, later in trees.items():
            written.add(name, layer, later, (file, *spans[name]))
        for name in _extra_states(trees, layer, source.dims.num_layers):
            written.objects[name] = (file, *spans[EXTRA_STATE])
    return written


def _stacked(later: Later) -> Later:
    """One layer of a stack."""
    return replace(later, shape=(1, *later.shape), make=lambda: later.make()[None])


def _extra_states(names: dict[str, Later], layer: int | None, num_layers: int) -> Iterator[str]:
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
