"""Which tensors a format stores, which rows each of them holds, and the way from one to the other.

The stored tensors of a format follow from the rows' slots: rows whose slots bear one name share a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import FormatLocation, Pack, ParamSpec
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.sharding import tensor_parallel


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a format: its name and the rows in it, in order (`rows[i]` and `slots[i]` belong to `keys[i]`)."""

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
        """The canonical dim that tensor parallelism cuts, part by part; None where every rank holds it all."""
        return self.params[0].tp_dim

    @property
    def is_vocab_parallel(self) -> bool:
        """True where the dim that is cut is the vocabulary."""
        return self.tp_dim is not None and self.params[0].axes[self.tp_dim].space == "vocab"

    def shape(self, model_config: ModelConfig, tp: int = 1) -> tuple[int, ...]:
        """Shape as the format stores it: whole (global, unpadded), or what each of tp ranks holds."""
        shapes = [_shard_shape(param, model_config, tp) for param in self.params]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (1,) * self.locations[0].unit_dims + (tuple(reversed(shape)) if self.transposed else shape)

    def part(self, tensor: Tensor, key: str, model_config: ModelConfig) -> Tensor:
        """The canonical tensor of one key out of the whole (global, unpadded) stored tensor; a view where it can be."""
        return self.local_part(tensor, key, model_config, 1)

    def whole(self, parts: Sequence[Tensor], model_config: ModelConfig) -> Tensor:
        """The stored tensor from the canonical tensors of `keys`, in order. The inverse of `part`."""
        return self.shard(parts, model_config, 1, 0)

    def shard(self, parts: Sequence[Tensor], model_config: ModelConfig, tp: int, rank: int) -> Tensor:
        """What a tensor-parallel rank stores, from the canonical (global) tensors of `keys`, in order."""
        pieces = [tensor_parallel.shard(part, param, tp, rank) for part, param in zip(parts, self.params, strict=True)]
        ordered = [
            tensor_parallel.interleave(piece, model_config.head_dim) if slot.interleaved else piece
            for piece, slot in zip(pieces, self.locations, strict=True)
        ]
        packed = tensor_parallel.pack(ordered, self.pack, model_config.num_kv_heads // tp)
        return self._with_unit_dims(packed.T if self.transposed else packed)

    def _with_unit_dims(self, tensor: Tensor) -> Tensor:
        units = self.locations[0].unit_dims
        return tensor.reshape(*(1,) * units, *tensor.shape) if units else tensor

    def local_part(self, tensor: Tensor, key: str, model_config: ModelConfig, tp: int) -> Tensor:
        """One key's shard out of what a rank stores; `layout.join` of all ranks' gives the canonical tensor."""
        index = self.keys.index(key)
        tensor = tensor.reshape(tensor.shape[self.locations[0].unit_dims :])
        local = tensor.T if self.transposed else tensor
        sizes = [param.shape(model_config)[0] // (tp if param.tp_dim == 0 else 1) for param in self.params]
        part = _cut_out(local, index, self.pack, sizes, model_config.num_kv_heads // tp)
        return tensor_parallel.deinterleave(part, model_config.head_dim) if self.locations[index].interleaved else part


def _shard_shape(param: ParamSpec, model_config: ModelConfig, tp: int) -> tuple[int, ...]:
    shape = param.shape(model_config)
    if param.tp_dim is None:
        return shape
    local = tensor_parallel.local_size(param.axes[param.tp_dim], model_config, tp)
    return (*shape[: param.tp_dim], local, *shape[param.tp_dim + 1 :])


def _cut_out(fused: Tensor, index: int, how: Pack, sizes: Sequence[int], groups: int) -> Tensor:
    """One part of `layout.unpack` without making the others."""
    if how is Pack.NONE:
        return fused
    start = sum(sizes[:index])
    if how is Pack.STACKED:
        return fused.narrow(0, start, sizes[index])
    rest = fused.shape[1:]
    grouped = fused.reshape(groups, fused.shape[0] // groups, *rest)
    return grouped.narrow(1, start // groups, sizes[index] // groups).reshape(-1, *rest)


def stored_tensors(arch: Architecture, model_config: ModelConfig, form: str) -> dict[str, StoredTensor]:
    """Every tensor that a checkpoint of these dims has in a format (a key of the rows' `slots`), in file order.

    ConfigError where the format has no place for this architecture.
    """
    if any(form not in param.locations for param in arch.params if param.is_stored(model_config)):
        raise ConfigError(Problem(form, "an architecture that it has names for", arch.name, "Choose another format."))
    found: dict[str, list[tuple[int, str, ParamSpec, FormatLocation]]] = {}
    for key in arch.keys(model_config):
        param = arch.param(key)
        slot = param.locations[form]
        found.setdefault(arch.stored_name(key, model_config, form), []).append((slot.part, key, param, slot))
    tensors = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, keys, rows, slots = zip(*parts, strict=True)
        assert len(parts) == slots[0].num_parts, f"{name}: the table names {len(parts)} of {slots[0].num_parts} parts"
        tensors[name] = StoredTensor(name, keys, rows, slots)
    return tensors
