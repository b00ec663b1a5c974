"""Shard, join, pack, unpack, pad, stage: pure functions between canonical tensors and a layout's tensors.

Shard first, pack last: a rank takes its shard of each unfused row, and only then are shards packed into
a fused tensor. Legend: G groups of KV heads, r query heads a group, d head size, F ffn size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Axis, Heads, Pack, ParamSpec, axis_size
from megatron_ligo.common.errors import ErrorCollector, LayoutError


def padded_vocab(vocab_size: int, tp: int) -> int:
    """The smallest multiple of tp that holds the vocabulary."""
    return -(-vocab_size // tp) * tp


def check_tp(model_config: ModelConfig, tp: int, errors: ErrorCollector, whose: str = "model") -> None:
    """Adds a fault for every size that tp does not divide."""
    for name in ("num_heads", "num_kv_heads", "ffn_size"):
        size = getattr(model_config, name)
        if size % tp:
            errors.add(f"tp = {tp}", f"a divisor of the {whose}'s {name}", f"{name} = {size}", "Choose another tp.")


def shard(tensor: Tensor, param: ParamSpec, tp: int, rank: int) -> Tensor:
    """Rank's part of a canonical tensor (a view where no padding is needed); the vocabulary is padded with zeros."""
    if param.tp_dim is None or tp == 1:
        return tensor
    if param.axes[param.tp_dim].space == "vocab":
        tensor = pad_vocab(tensor, padded_vocab(tensor.shape[param.tp_dim], tp))
    size = tensor.shape[param.tp_dim]
    assert size % tp == 0, f"{param.key}: {size} over tp {tp} (check_tp comes first)"
    return tensor.narrow(param.tp_dim, rank * (size // tp), size // tp)


def unshard(shards: Sequence[Tensor], param: ParamSpec, model_config: ModelConfig) -> Tensor:
    """The canonical tensor from the shards of all tensor-parallel ranks, without the vocabulary's padding."""
    if param.tp_dim is None:
        return shards[0]
    full = torch.cat(list(shards), dim=param.tp_dim) if len(shards) > 1 else shards[0]
    return full.narrow(param.tp_dim, 0, param.shape(model_config)[param.tp_dim])


def pad_vocab(tensor: Tensor, size: int) -> Tensor:
    """Zero rows below, up to `size` rows."""
    if tensor.shape[0] == size:
        return tensor
    padded = tensor.new_zeros((size, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    return padded


def pack(parts: Sequence[Tensor], how: Pack, groups: int) -> Tensor:
    """One fused tensor from its parts (whole tensors or shards of one rank). groups: KV groups in the parts.

    GROUPED: (G r d, n), (G d, n), (G d, n) -> (G (r + 2) d, n), group by group. STACKED: along dim 0.
    """
    if how is Pack.NONE:
        (only,) = parts
        return only
    if how is Pack.STACKED:
        return torch.cat(list(parts), dim=0)
    rest = parts[0].shape[1:]
    grouped = [part.reshape(groups, part.shape[0] // groups, *rest) for part in parts]
    return torch.cat(grouped, dim=1).reshape(-1, *rest)


def unpack(fused: Tensor, how: Pack, sizes: Sequence[int], groups: int) -> list[Tensor]:
    """The inverse of `pack`; `sizes` are the parts' dim-0 sizes."""
    if how is Pack.NONE:
        return [fused]
    if how is Pack.STACKED:
        return list(fused.split(list(sizes), dim=0))
    rest = fused.shape[1:]
    grouped = fused.reshape(groups, fused.shape[0] // groups, *rest)
    return [part.reshape(-1, *rest) for part in grouped.split([size // groups for size in sizes], dim=1)]


def interleave(tensor: Tensor, head_dim: int) -> Tensor:
    """Rotary rows from half-split pairs (i, i + d/2) to neighbours (2i, 2i + 1): GGUF's and Meta's order."""
    rest = tensor.shape[1:]
    return tensor.reshape(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(-1, *rest)


def deinterleave(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    rest = tensor.shape[1:]
    return tensor.reshape(-1, head_dim // 2, 2, *rest).transpose(1, 2).reshape(-1, *rest)


def local_size(axis: Axis, model_config: ModelConfig, tp: int) -> int:
    """Features of an axis on one tensor-parallel rank, when the axis is the one that is split."""
    size = axis_size(axis, model_config)
    return padded_vocab(size, tp) // tp if axis.heads is Heads.NONE and axis.space == "vocab" else size // tp


def stage_bounds(num_layers: int, pp: int) -> list[int]:
    """Layer numbers at which the pipeline's stages begin, and the end: pp + 1 numbers, sizes differ by at most 1."""
    if pp > num_layers:
        raise LayoutError(
            f"pp = {pp}: expected at most one stage a layer, found {num_layers} layers. Choose a smaller pp."
        )
    return [stage * num_layers // pp for stage in range(pp + 1)]
