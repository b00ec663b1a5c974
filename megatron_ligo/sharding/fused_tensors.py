"""Which tensors a format stores, which rows each of them holds, and the way from one to the other.

The stored tensors of a format follow from the rows' slots: rows whose slots bear one name share a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_ligo.arch.model_config import Dims
from megatron_ligo.arch.spec import Architecture, Pack, Row, Slot
from megatron_ligo.common.errors import ConfigError, message
from megatron_ligo.sharding import tensor_parallel


@dataclass(frozen=True)
class Stored:
    """One tensor of a format: its name and the rows in it, in order (`rows[i]` and `slots[i]` belong to `keys[i]`)."""

    name: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    slots: tuple[Slot, ...]

    @property
    def pack(self) -> Pack:
        return self.slots[0].pack

    @property
    def transposed(self) -> bool:
        return self.slots[0].transposed

    @property
    def split(self) -> int | None:
        """The canonical dim that tensor parallelism cuts, part by part; None where every rank holds it all."""
        return self.rows[0].split

    @property
    def vocabulary(self) -> bool:
        """True where the dim that is cut is the vocabulary."""
        return self.split is not None and self.rows[0].axes[self.split].space == "vocab"

    def shape(self, dims: Dims, tp: int = 1) -> tuple[int, ...]:
        """Shape as the format stores it: whole (global, unpadded), or what each of tp ranks holds."""
        shapes = [_shard_shape(row, dims, tp) for row in self.rows]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (1,) * self.slots[0].unit_dims + (tuple(reversed(shape)) if self.transposed else shape)

    def part(self, tensor: Tensor, key: str, dims: Dims) -> Tensor:
        """The canonical tensor of one key out of the whole (global, unpadded) stored tensor; a view where it can be."""
        return self.local_part(tensor, key, dims, 1)

    def whole(self, parts: Sequence[Tensor], dims: Dims) -> Tensor:
        """The stored tensor from the canonical tensors of `keys`, in order. The inverse of `part`."""
        return self.shard(parts, dims, 1, 0)

    def shard(self, parts: Sequence[Tensor], dims: Dims, tp: int, rank: int) -> Tensor:
        """What a tensor-parallel rank stores, from the canonical (global) tensors of `keys`, in order."""
        pieces = [tensor_parallel.shard(part, row, tp, rank) for part, row in zip(parts, self.rows, strict=True)]
        ordered = [
            tensor_parallel.interleave(piece, dims.head_dim) if slot.interleaved else piece
            for piece, slot in zip(pieces, self.slots, strict=True)
        ]
        packed = tensor_parallel.pack(ordered, self.pack, dims.num_kv_heads // tp)
        return self._with_unit_dims(packed.T if self.transposed else packed)

    def _with_unit_dims(self, tensor: Tensor) -> Tensor:
        units = self.slots[0].unit_dims
        return tensor.reshape(*(1,) * units, *tensor.shape) if units else tensor

    def local_part(self, tensor: Tensor, key: str, dims: Dims, tp: int) -> Tensor:
        """One key's shard out of what a rank stores; `layout.join` of all ranks' gives the canonical tensor."""
        index = self.keys.index(key)
        tensor = tensor.reshape(tensor.shape[self.slots[0].unit_dims :])
        local = tensor.T if self.transposed else tensor
        sizes = [row.shape(dims)[0] // (tp if row.split == 0 else 1) for row in self.rows]
        part = _cut_out(local, index, self.pack, sizes, dims.num_kv_heads // tp)
        return tensor_parallel.deinterleave(part, dims.head_dim) if self.slots[index].interleaved else part


def _shard_shape(row: Row, dims: Dims, tp: int) -> tuple[int, ...]:
    shape = row.shape(dims)
    if row.split is None:
        return shape
    local = tensor_parallel.local_size(row.axes[row.split], dims, tp)
    return (*shape[: row.split], local, *shape[row.split + 1 :])


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


def stored(arch: Architecture, dims: Dims, form: str) -> dict[str, Stored]:
    """Every tensor that a checkpoint of these dims has in a format (a key of the rows' `slots`), in file order.

    ConfigError where the format has no place for this architecture.
    """
    if any(form not in row.slots for row in arch.rows if row.stored(dims)):
        raise ConfigError(message(form, "an architecture that it has names for", arch.name, "Choose another format."))
    found: dict[str, list[tuple[int, str, Row, Slot]]] = {}
    for key in arch.keys(dims):
        row = arch.row(key)
        slot = row.slots[form]
        found.setdefault(arch.stored_name(key, dims, form), []).append((slot.part, key, row, slot))
    tensors = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, keys, rows, slots = zip(*parts, strict=True)
        assert len(parts) == slots[0].of, f"{name}: the table names {len(parts)} of {slots[0].of} parts"
        tensors[name] = Stored(name, keys, rows, slots)
    return tensors
