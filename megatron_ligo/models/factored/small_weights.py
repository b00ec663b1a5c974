"""One stage's frozen small weights, divided among the ranks that would otherwise mix the same numbers twice.

Each rank of the mix group (the tensor-parallel ranks of a stage; with ZeRO 3 its data-parallel ranks as well)
keeps an equal slice of every row of every small layer, mixes that slice, and gathers the mixed row: one small
layer of traffic a large layer, no redundant reads, and 1 / group of the source in memory. Where there is room and the
traffic weighs more, each rank keeps it whole and mixes all of it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to, gather_partial
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.random_init import root_mean_square
from megatron_ligo.sharding.tensor_parallel import shard

CHUNK = 1 << 18  # columns mixed at once where the source is kept in a narrower dtype than it is mixed in


class _Mix(torch.autograd.Function):
    """weights @ stack in fp32: (layers, L), (L, n) -> (layers, n). The stack is frozen and may be narrower."""

    @staticmethod
    def forward(ctx, weights: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(stack)
        if stack.dtype == weights.dtype:
            return weights @ stack
        return torch.cat([weights @ part.to(weights.dtype) for part in stack.split(CHUNK, dim=1)], dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (stack,) = ctx.saved_tensors
        if stack.dtype == grad.dtype:
            return grad @ stack.t(), None
        parts = zip(stack.split(CHUNK, dim=1), grad.split(CHUNK, dim=1), strict=True)
        return torch.stack([piece @ part.to(grad.dtype).t() for part, piece in parts]).sum(dim=0), None


class SmallWeights:
    """What this rank keeps of the small model. Not a module: its tensors are no parameters and never change."""

    def __init__(self, operator: Operator, reader: Reader, mesh: Mesh, zero: int, whole: bool = False):
        self.operator = operator
        self.mesh = mesh
        self.group = mesh.tp_dp_group if zero == 3 else mesh.tp_group
        self.ranks = 1 if whole else dist.get_world_size(self.group)
        params = reader.arch.layer_params(reader.model_config)
        self.split_rows = [param for param in params if param.tp_dim is not None]
        self.whole_rows = [param for param in params if param.tp_dim is None]
        self.shapes = {param.key: param.shape(reader.model_config) for param in params}
        self.rms: dict[str, float] = {}  # root mean square of each small tensor that is cut, by key
        self._slices = [self._read_slices(reader, param) for param in self.split_rows]
        self._wholes = [self._read_whole(reader, param) for param in self.whole_rows]
        self.outside: dict[str, Tensor] = {}  # by key: what this stage needs of the rows outside the layers
        first, last = reader.arch.params_outside_layers(reader.model_config)
        for param in (first if mesh.first_stage else []) + (last if mesh.last_stage else []):
            self.outside[param.key] = self._read_outside(reader, param)
        if mesh.last_stage and reader.model_config.tied:
            embed = self.outside.get("embed")
            self.outside["head"] = self._read_outside(reader, reader.arch.param("embed")) if embed is None else embed

    def _read_outside(self, reader: Reader, param: ParamSpec) -> Tensor:
        """This rank's part, with rows for what only the large model has."""
        tensor = self.operator.with_new_rows(param.key, reader.read(param.key))
        part = tensor if param.tp_dim is None else shard(tensor, param, self.mesh.tp, self.mesh.tp_rank).clone()
        return part.float().to(device.current_device())

    def _read_slices(self, reader: Reader, param: ParamSpec) -> Tensor:
        numel = math.prod(self.shapes[param.key])
        size = -(-numel // self.ranks)
        start = 0 if self.ranks == 1 else dist.get_rank(self.group) * size
        keys = [param.key.format(layer) for layer in range(reader.model_config.num_layers)]
        stack = torch.zeros(len(keys), size, dtype=torch.float32)
        for i, key in enumerate(keys):
            tensor = reader.read(key)
            self.rms[key] = root_mean_square(tensor)
            piece = tensor.reshape(-1)[start : start + size]
            stack[i, : piece.numel()] = piece
        narrow = stack.to(torch.bfloat16)
        exact = torch.equal(narrow.float(), stack)
        return (narrow if exact else stack).to(device.current_device())

    def _read_whole(self, reader: Reader, param: ParamSpec) -> Tensor:
        keys = [param.key.format(layer) for layer in range(reader.model_config.num_layers)]
        return torch.stack([reader.read(key).float() for key in keys]).to(device.current_device())

    def mix_split(self, depth: Tensor, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """The mixed small rows that tensor parallelism cuts, whole, in dtype, for each of some large layers.

        depth: (layers, rows, small layers), fp32. Every use of them is partial: their gradients are summed over the
        mix group, each rank takes its slice.
        """
        depth = copy_to(depth, self.mesh.tp_group)
        weights = depth.unbind(1)
        mixed = [_Mix.apply(w, stack).to(dtype) for w, stack in zip(weights, self._slices, strict=True)]
        if self.ranks == 1:
            parts = [part.unbind(0) for part in mixed]
        else:
            sizes = [part.shape[1] for part in mixed]
            gathered = gather_partial(torch.cat(mixed, dim=1), self.group)
            parts = [part.unbind(1) for part in gathered.split(sizes, dim=2)]
        return [self._shaped([part[layer] for part in parts]) for layer in range(len(depth))]

    def _shaped(self, parts: list[Tensor]) -> dict[str, Tensor]:
        found = {}
        for param, part in zip(self.split_rows, parts, strict=True):
            shape = self.shapes[param.key]
            found[param.key] = part.reshape(-1)[: math.prod(shape)].view(shape)
        return found

    def mix_whole(self, depth: Tensor) -> list[dict[str, Tensor]]:
        """The mixed small rows that every rank uses completely (norms, biases of the residual stream), fp32.

        depth: (layers, rows, small layers).
        """
        keys = [param.key for param in self.whole_rows]
        mixed = [w @ stack.flatten(1) for w, stack in zip(depth.unbind(1), self._wholes, strict=True)]
        return [dict(zip(keys, parts, strict=True)) for parts in zip(*mixed, strict=True)]
