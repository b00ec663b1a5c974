"""One stage's frozen small weights, sliced over the ranks to avoid redundant mixing.

Each rank of the mix group (the tensor-parallel ranks of a stage; with ZeRO 3 all ranks of the stage)
keeps an equal slice of every parameter of every small layer, mixes that slice, and gathers the mixed parameter: one
small layer of traffic per large layer, no redundant reads, and 1 / group of the source in memory. If memory allows and
the traffic costs more, each rank keeps and mixes all of it (`keep_all`).

Legend: L small layers, n entries of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import ParamSpec, Role, Use
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to, gather_partial
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth import random_init
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.row_tables import read_or_neutral
from megatron_ligo.sharding.tensor_parallel import shard


class _Mix(torch.autograd.Function):
    """weights @ stack in fp32: (large layers, L), (L, n) -> (large layers, n). The stack is frozen and may be
    narrower."""

    @staticmethod
    def forward(ctx, weights: Tensor, stack: Tensor) -> Tensor:
        ctx.save_for_backward(stack)
        if stack.dtype == weights.dtype:
            return weights @ stack
        chunks = stack.split(device.columns_per_product(), dim=1)
        return torch.cat([weights @ chunk.to(weights.dtype) for chunk in chunks], dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (stack,) = ctx.saved_tensors
        if stack.dtype == grad.dtype:
            return grad @ stack.t(), None
        columns = device.columns_per_product()
        pairs = zip(stack.split(columns, dim=1), grad.split(columns, dim=1), strict=True)
        return torch.stack([grad_chunk @ chunk.to(grad.dtype).t() for chunk, grad_chunk in pairs]).sum(dim=0), None


def _small_shape(spec: ParamSpec, model_config: ModelConfig) -> tuple[int, ...]:
    """Returns the shape of a parameter in a small layer; of its experts (experts, ...)."""
    shape = spec.shape(model_config)
    return (model_config.num_experts, *shape) if spec.in_expert else shape


@dataclass
class OutsideTensors:
    """A stage's tensors outside the layers, one per parameter, by role. A tied head's is the embedding's."""

    weights: dict[Role, Tensor] = field(default_factory=dict)
    biases: dict[Role, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls, arch: Architecture, model_config: ModelConfig, mesh: Mesh, read: Callable[[ParamSpec], Tensor | None]
    ) -> OutsideTensors:
        """Reads one tensor per parameter. `read` returns a tensor of any shape, or None for a parameter without one."""
        tensors = cls()
        first, last = arch.params_outside_layers(model_config)
        for spec in (first if mesh.first_stage else []) + (last if mesh.last_stage else []):
            tensor = read(spec)
            if tensor is not None:
                (tensors.biases if spec.is_bias else tensors.weights)[spec.role] = tensor
        if mesh.last_stage and model_config.tied:
            embedding = tensors.weights.get(Role.WORD_EMBEDDING)
            embedding = read(arch.get(Role.WORD_EMBEDDING)) if embedding is None else embedding
            if embedding is not None:
                tensors.weights[Role.HEAD] = embedding
        return tensors


class SmallWeights:
    """This rank's part of the small model. Not an nn.Module: its tensors are constants, not parameters.

    split_specs, whole_specs: the layers' parameters that are sharded over TP, and the replicated ones. rms: root mean
    square, by key, of the split small tensors beside which random rows stand.
    """

    def __init__(self, operator: Operator, reader: Reader, mesh: Mesh, zero: int, keep_all: bool = False):
        self.operator = operator
        self.mesh = mesh
        self.group = mesh.stage_group if zero == 3 else mesh.tp_group
        self.num_slices = 1 if keep_all else dist.get_world_size(self.group)
        specs = reader.arch.layer_params(reader.model_config)
        self.split_specs = [spec for spec in specs if spec.tp_dim is not None]
        self.whole_specs = [spec for spec in specs if spec.tp_dim is None]
        self.shapes = {spec.key: _small_shape(spec, reader.model_config) for spec in specs}
        self.rms: dict[str, float] = {}
        self._slices = [self._read_slices(reader, spec) for spec in self.split_specs]
        self._wholes = [self._read_whole(reader, spec) for spec in self.whole_specs]
        self.outside = OutsideTensors.read(
            reader.arch, reader.model_config, mesh, lambda spec: self._read_outside(reader, spec)
        )

    def _read_outside(self, reader: Reader, spec: ParamSpec) -> Tensor:
        """Returns this rank's shard, fp32, with rows for the tokens and positions that only the large model has."""
        tensor = self.operator.extend_table(spec.key, self._read(reader, spec, spec.key))
        local = tensor if spec.tp_dim is None else shard(tensor, spec, self.mesh.tp, self.mesh.tp_rank).clone()
        return local.float().to(device.current_device())

    @staticmethod
    def _read(reader: Reader, spec: ParamSpec, key: str) -> Tensor:
        """Returns a small tensor; of a norm, the gain by which it multiplies."""
        tensor = reader.read(key)
        return tensor + reader.arch.gain_offset if spec.axes[0].use is Use.GAIN and reader.arch.gain_offset else tensor

    def _read_slices(self, reader: Reader, spec: ParamSpec) -> Tensor:
        """Returns this rank's slice of a parameter in every layer, (L, n / slices), in bf16 if exact, else fp32.

        Of a layer's experts it is one tensor, expert by expert. The host holds one layer at a time, besides the files
        that all ranks of a node map.
        """
        size = -(-math.prod(self.shapes[spec.key]) // self.num_slices)
        start = 0 if self.num_slices == 1 else dist.get_rank(self.group) * size
        num_layers = reader.model_config.num_layers
        stack = torch.zeros(num_layers, size, dtype=torch.bfloat16, device=device.current_device())
        draws_rows = random_init.has_added_rows(self.operator, spec)
        for i in range(num_layers):
            experts = range(reader.model_config.num_experts) if spec.in_expert else (0,)
            keys = [spec.key.format(i, expert) for expert in experts]
            tensors = [self._read(reader, spec, key) for key in keys]
            tensor = torch.stack(tensors) if spec.in_expert else tensors[0]
            if draws_rows:
                parts = zip(keys, tensors, strict=True)
                self.rms |= {key: random_init.root_mean_square(part) for key, part in parts}
            piece = tensor.reshape(-1)[start : start + size]
            if stack.dtype is torch.bfloat16 and not torch.equal(piece.to(torch.bfloat16).to(piece.dtype), piece):
                stack = stack.float()
            stack[i, : piece.numel()] = piece
        return stack

    def _read_whole(self, reader: Reader, spec: ParamSpec) -> Tensor:
        """Returns a parameter of every layer, (L, ...), fp32."""
        keys = [spec.key.format(layer) for layer in range(reader.model_config.num_layers)]

        def read(key: str) -> Tensor:
            return self._read(reader, spec, key).float()

        read_layer = read_or_neutral(spec, reader.model_config, read) if spec.skips_first_layer else read
        return torch.stack([read_layer(key) for key in keys]).to(device.current_device())

    def mix_split(self, depth: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Mixes the TP-sharded parameters of some large layers: by key (large layers, *small shape), in dtype.

        depth: (large layers, split_specs, L), fp32. Every rank gets each parameter whole and uses a part of it, so
        gradients are summed over the mix group, and each rank keeps its slice.
        """
        depth = copy_to(depth, self.mesh.tp_group)
        weights = depth.unbind(1)
        mixed = [_Mix.apply(w, stack).to(dtype) for w, stack in zip(weights, self._slices, strict=True)]
        if self.num_slices > 1:
            sizes = [part.shape[1] for part in mixed]
            gathered = gather_partial(torch.cat(mixed, dim=1), self.group)
            mixed = [part.transpose(0, 1).flatten(1) for part in gathered.split(sizes, dim=2)]
        tensors = {}
        for spec, part in zip(self.split_specs, mixed, strict=True):
            shape = self.shapes[spec.key]
            # Slices are padded to equal sizes.
            tensors[spec.key] = part[:, : math.prod(shape)].reshape(len(depth), *shape)
        return tensors

    def mix_whole(self, depth: Tensor) -> dict[str, Tensor]:
        """Mixes the replicated parameters (norms, residual biases, routers) like `mix_split`, but in fp32.

        depth: (large layers, whole_specs, L). The gradients must be complete: `FactoredContext.enter_partial_use` sums
        them for partial uses.
        """
        keys = [spec.key for spec in self.whole_specs]
        mixed = [w @ stack.flatten(1) for w, stack in zip(depth.unbind(1), self._wholes, strict=True)]
        return {key: part.unflatten(1, self.shapes[key]) for key, part in zip(keys, mixed, strict=True)}
