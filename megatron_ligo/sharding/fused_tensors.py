"""Fused tensors: the tensors that a format stores, the parameters in each, and their packing.

Parameters whose locations in a format have the same name share one stored tensor.

Legend: G groups of KV heads, r query heads a group, d head size, n in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.sharding import tensor_parallel


def pack(parts: Sequence[Tensor], how: Pack, groups: int) -> Tensor:
    """Packs whole tensors, or the shards of one rank, into a fused tensor. groups: KV groups in the parts.

    GROUPED: (G r d, n), (G d, n), (G d, n) -> (G (r + 2) d, n), group by group. STACKED: along dim 0. JOINED: along
    dim 1.
    """
    if how is Pack.NONE:
        (only,) = parts
        return only
    if how is Pack.STACKED:
        return torch.cat(list(parts), dim=0)
    if how is Pack.JOINED:
        return torch.cat(list(parts), dim=1)
    rest = parts[0].shape[1:]
    grouped = [part.reshape(groups, part.shape[0] // groups, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def unpack(fused: Tensor, index: int, how: Pack, sizes: Sequence[int], groups: int) -> Tensor:
    """Returns one part of a fused tensor, a view if possible. Inverse of `pack`.

    sizes: all parts' sizes along dim 0, of joined ones along dim 1.

    GROUPED: (G (r + 2) d, n) -> (G r d, n) or (G d, n). STACKED: (sum of sizes, n) -> (sizes[index], n).
    """
    if how is Pack.NONE:
        return fused
    start = sum(sizes[:index])
    if how in (Pack.STACKED, Pack.JOINED):
        return fused.narrow(int(how is Pack.JOINED), start, sizes[index])
    rest = fused.shape[1:]
    grouped = fused.reshape(groups, fused.shape[0] // groups, *rest)
    return grouped.narrow(1, start // groups, sizes[index] // groups).reshape(-1, *rest)


def interleave(tensor: Tensor, head_dim: int, num_rotated: int | None = None) -> Tensor:
    """Reorders rotary pairs from half-split (i, i + d / 2) to neighbours (2i, 2i + 1), as in GGUF and Meta's files.

    (heads d, ...) -> (heads d, ...). num_rotated: how many features of a head rotate, the first ones; None = all.
    """
    return _reorder(tensor, head_dim, num_rotated, lambda size: (2, size // 2))


def deinterleave(tensor: Tensor, head_dim: int, num_rotated: int | None = None) -> Tensor:
    """Reorders rotary pairs from neighbours to half-split: (heads d, ...) -> (heads d, ...). Inverts `interleave`."""
    return _reorder(tensor, head_dim, num_rotated, lambda size: (size // 2, 2))


def _reorder(tensor: Tensor, head_dim: int, num_rotated: int | None, shape: Callable[[int], tuple[int, int]]) -> Tensor:
    """Transposes the first features of each head, taken as a matrix of a shape."""
    rotated = head_dim if num_rotated is None else num_rotated
    heads = tensor.reshape(-1, head_dim, *tensor.shape[1:])
    moved = heads[:, :rotated].unflatten(1, shape(rotated)).transpose(1, 2).flatten(1, 2)
    return torch.cat([moved, heads[:, rotated:]], dim=1).reshape(tensor.shape)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a format. Its parts, in order, are `keys[i]`, described by `params[i]` and `locations[i]`.

    Parts have their canonical shapes; `shape` returns the stored one.
    """

    name: str
    keys: tuple[str, ...]
    params: tuple[ParamSpec, ...]
    locations: tuple[FormatLocation, ...]

    @property
    def pack(self) -> Pack:
        return self.locations[0].pack

    @property
    def transposed(self) -> bool:
        return self.locations[0].transposed

    @property
    def tp_dim(self) -> int | None:
        """Canonical dim of each part that tensor parallelism shards; None = replicated."""
        return self.params[0].tp_dim

    @property
    def is_vocab_parallel(self) -> bool:
        """True if the sharded dim is the vocabulary."""
        return self.tp_dim is not None and self.params[0].axes[self.tp_dim].space == "vocab"

    def shape(self, model_config: ModelConfig, tp: int = 1) -> tuple[int, ...]:
        """Returns the stored shape: of the whole (unpadded) tensor, or of each rank's shard (padded)."""
        shapes = [tensor_parallel.local_shape(param, model_config, tp) for param in self.params]
        if self.pack is Pack.JOINED:
            shape = (shapes[0][0], sum(shape[1] for shape in shapes))
        else:
            shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (1,) * self.locations[0].unit_dims + (tuple(reversed(shape)) if self.transposed else shape)

    def extract(self, tensor: Tensor, key: str, model_config: ModelConfig) -> Tensor:
        """Returns the canonical tensor of a key, (out, in), from the whole stored tensor; a view if possible."""
        return self.extract_shard(tensor, key, model_config, 1)

    def assemble(self, parts: Sequence[Tensor], model_config: ModelConfig) -> Tensor:
        """Returns the whole stored tensor from the canonical tensors of `keys`, (out, in) each. Inverts `extract`."""
        return self.assemble_shard(parts, model_config, 1, 0)

    def extract_shard(self, tensor: Tensor, key: str, model_config: ModelConfig, tp: int) -> Tensor:
        """Returns a key's shard, (out / tp, in) or (out, in / tp), from the stored tensor of a rank.

        `tensor_parallel.unshard` of all ranks' shards is the canonical tensor.
        """
        index = self.keys.index(key)
        tensor = tensor.reshape(tensor.shape[self.locations[0].unit_dims :])
        local = tensor.T if self.transposed else tensor
        dim = int(self.pack is Pack.JOINED)
        sizes = [param.shape(model_config)[dim] // (tp if param.tp_dim == dim else 1) for param in self.params]
        part = unpack(local, index, self.pack, sizes, model_config.num_kv_heads // tp)
        rotated = model_config.num_rotated
        return deinterleave(part, model_config.head_dim, rotated) if self.locations[index].interleaved else part

    def assemble_shard(self, parts: Sequence[Tensor], model_config: ModelConfig, tp: int, rank: int) -> Tensor:
        """Returns the stored tensor of a rank from the canonical (global) tensors of `keys`, (out, in) each."""
        shards = [tensor_parallel.shard(part, param, tp, rank) for part, param in zip(parts, self.params, strict=True)]
        ordered = [
            interleave(shard, model_config.head_dim, model_config.num_rotated) if location.interleaved else shard
            for shard, location in zip(shards, self.locations, strict=True)
        ]
        packed = pack(ordered, self.pack, model_config.num_kv_heads // tp)
        stored = packed.T if self.transposed else packed
        unit_dims = self.locations[0].unit_dims
        return stored.reshape(*(1,) * unit_dims, *stored.shape) if unit_dims else stored


def stored_tensors(arch: Architecture, model_config: ModelConfig, format_name: str) -> dict[str, StoredTensor]:
    """Returns every tensor of a model in a format (a key of `ParamSpec.locations`), by name and in file order.

    ConfigError if the format has no names for this architecture.
    """
    if any(format_name not in param.locations for param in arch.params if param.is_stored(model_config)):
        expected = "an architecture that it has names for"
        raise ConfigError(Problem(format_name, expected, arch.name, "Choose another format."))
    parts_by_name: dict[str, list[tuple[int, str, ParamSpec, FormatLocation]]] = {}
    for key in arch.keys(model_config):
        param = arch.param(key)
        location = param.locations[format_name]
        name = arch.stored_name(key, model_config, format_name)
        parts_by_name.setdefault(name, []).append((location.part, key, param, location))
    tensors = {}
    for name, parts in parts_by_name.items():
        parts.sort(key=lambda part: part[0])
        _, keys, params, locations = zip(*parts, strict=True)
        expected_parts = locations[0].num_parts
        assert len(parts) == expected_parts, f"{name}: the table names {len(parts)} of {expected_parts} parts"
        tensors[name] = StoredTensor(name, keys, params, locations)
    return tensors
