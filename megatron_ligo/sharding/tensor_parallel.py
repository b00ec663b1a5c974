"""Tensor parallelism of canonical tensors: sharding, unsharding and vocabulary padding.

Unfused parameters are sharded first; the shards are then packed into fused tensors (fused_tensors.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Axis, Heads, ParamSpec, axis_size
from megatron_ligo.common.errors import ErrorCollector


def padded_vocab(vocab_size: int, tp: int) -> int:
    """Returns the smallest multiple of tp that holds the vocabulary."""
    return -(-vocab_size // tp) * tp


def check_tp(model_config: ModelConfig, tp: int, errors: ErrorCollector, whose: str = "model") -> None:
    """Adds an error for every size that tp does not divide."""
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        size = getattr(model_config, name)
        if size % tp:
            errors.add(f"tp = {tp}", f"a divisor of the {whose}'s {name}", f"{name} = {size}", "Choose another tp.")


def shard(tensor: Tensor, param: ParamSpec, tp: int, rank: int) -> Tensor:
    """Returns a rank's shard of a canonical tensor: (..., n, ...) -> (..., n / tp, ...) along `param.tp_dim`.

    The vocabulary is padded with zeros to a multiple of tp. The shard is a view unless padding is needed.
    """
    dim = param.tp_dim
    if dim is None or tp == 1:
        return tensor
    if param.axes[dim].space == "vocab":
        tensor = pad_vocab(tensor, padded_vocab(tensor.shape[dim], tp))
    size = tensor.shape[dim]
    assert size % tp == 0, f"{param.key}: {size} over tp {tp} (check_tp comes first)"
    return tensor.narrow(dim, rank * (size // tp), size // tp)


def unshard(shards: Sequence[Tensor], param: ParamSpec, model_config: ModelConfig) -> Tensor:
    """Returns the canonical tensor from all ranks' shards, without vocabulary padding. Inverse of `shard`.

    tp shards (..., n / tp, ...) -> (..., n, ...) along `param.tp_dim`.
    """
    dim = param.tp_dim
    if dim is None:
        return shards[0]
    full = torch.cat(list(shards), dim=dim) if len(shards) > 1 else shards[0]
    return full.narrow(dim, 0, param.shape(model_config)[dim])


def pad_vocab(tensor: Tensor, size: int) -> Tensor:
    """Appends rows of zeros: (V, ...) -> (size, ...)."""
    if tensor.shape[0] == size:
        return tensor
    padded = tensor.new_zeros((size, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


def local_size(axis: Axis, model_config: ModelConfig, tp: int) -> int:
    """Returns the number of features of a sharded axis on one rank, padding included."""
    size = axis_size(axis, model_config)
    return padded_vocab(size, tp) // tp if axis.heads is Heads.NONE and axis.space == "vocab" else size // tp


def local_shape(param: ParamSpec, model_config: ModelConfig, tp: int) -> tuple[int, ...]:
    """Returns the shape of one rank's shard, padding included."""
    shape, dim = param.shape(model_config), param.tp_dim
    if dim is None:
        return shape
    return (*shape[:dim], local_size(param.axes[dim], model_config, tp), *shape[dim + 1 :])


def exchanged_kv_heads(heads: int, groups: int, ranks: int) -> int:
    """Returns how many key-value heads context-parallel ranks divide among them, each in as many copies as that takes:
    the fewest multiple of `groups` that the ranks, and `heads` queries, can share."""
    shared = math.lcm(groups, ranks)
    return heads if heads % shared else shared
