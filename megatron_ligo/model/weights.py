"""The tensors of a Megatron-core model by name: which rows each holds, and one rank's part of it.

The names are those of Megatron-core's own (local) layers, at every layout and with every layer spec: a checkpoint
that is keyed by them fits any of our models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo import layout
from megatron_ligo.arch.dims import Dims
from megatron_ligo.arch.rows import Pack, Row, Use, layer_of
from megatron_ligo.growth.operator import residual_write
from megatron_ligo.parallel.mesh import Mesh

Read = Callable[[str], Tensor]  # canonical key -> canonical tensor

INIT_STD = 0.02


@dataclass(frozen=True)
class Packed:
    """One tensor of the model: its name and the rows packed into it, in order (`rows[i]` holds `keys[i]`)."""

    name: str
    keys: tuple[str, ...]
    rows: tuple[Row, ...]
    pack: Pack

    @property
    def split(self) -> int | None:
        """The dim that tensor parallelism cuts, part by part; None where every rank holds it all."""
        return self.rows[0].split

    @property
    def vocabulary(self) -> bool:
        """True where the dim that is cut is the vocabulary, which is padded to a multiple of tp."""
        return self.split is not None and self.rows[0].axes[self.split].space == "vocab"

    def part_sizes(self, dims: Dims) -> list[int]:
        """Global size of each part along the dim that is cut."""
        assert self.split is not None, f"{self.name} is not cut"
        return [row.shape(dims)[self.split] for row in self.rows]

    def shape(self, dims: Dims) -> tuple[int, ...]:
        """Global shape of the packed tensor, without the vocabulary's padding."""
        shapes = [row.shape(dims) for row in self.rows]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def packed_tensors(dims: Dims) -> dict[str, Packed]:
    """Every tensor of the Megatron-core model of these dims, by name."""
    arch = architectures.get(dims.arch)
    found: dict[str, list[tuple[int, str, Row]]] = {}
    for key in arch.keys(dims):
        row = arch.row(key)
        slot = row.slots["mcore"]
        name = slot.name.format(layer_of(key)) if row.in_layer else slot.name
        found.setdefault(name, []).append((slot.part, key, row))
    packed = {}
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        _, keys, rows = zip(*parts, strict=True)
        packed[name] = Packed(name, keys, rows, rows[0].slots["mcore"].pack)
    return packed


def local_tensor(item: Packed, read: Read, dims: Dims, tp: int, rank: int) -> Tensor:
    """A tensor-parallel rank's part: each row's shard, packed. May be a view of what `read` gave."""
    shards = [layout.shard(read(key), row, tp, rank) for key, row in zip(item.keys, item.rows, strict=True)]
    return layout.pack(shards, item.pack, dims.num_kv_heads // tp)


def fill(model: nn.Module, dims: Dims, mesh: Mesh, read: Read) -> None:
    """Sets every parameter of this rank's model (not yet in an engine) from canonical tensors, cast to its dtype."""
    for parameter, item in parameters(model, dims):
        with torch.no_grad():
            parameter.copy_(local_tensor(item, read, dims, mesh.tp, mesh.tp_rank))


def parameters(model: nn.Module, dims: Dims) -> Iterator[tuple[nn.Parameter, Packed]]:
    """Each parameter of a model with what it holds."""
    packed = packed_tensors(dims)
    for name, parameter in model.named_parameters():
        assert name in packed, f"{name} is no tensor of the table's"
        yield parameter, packed[name]


def mark_split(model: nn.Module, dims: Dims, tp: int) -> None:
    """Says on each parameter whether tensor parallelism cuts it: gradient norms count the others on one rank only."""
    for parameter, item in parameters(model, dims):
        cut = tp > 1 and item.split is not None
        parameter.tensor_model_parallel = cut
        parameter.partition_dim = item.split if cut else -1
        parameter.partition_stride = 1


def initial(dims: Dims, seed: int) -> Read:
    """Fresh weights as Megatron draws them, the same at any layout: each tensor has a seed of its own, in fp32.

    Gains 1, biases 0, matrices N(0, 0.02); those that write to the residual stream N(0, 0.02 / sqrt(2 layers)).
    """
    arch = architectures.get(dims.arch)

    def read(key: str) -> Tensor:
        row = arch.row(key)
        shape = row.shape(dims)
        if row.axes[0].use is Use.SCALES:
            return torch.ones(shape)
        if len(shape) == 1:
            return torch.zeros(shape)
        std = INIT_STD / (2 * dims.num_layers) ** 0.5 if residual_write(row) else INIT_STD
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(shape).normal_(0.0, std, generator=generator)

    return read
