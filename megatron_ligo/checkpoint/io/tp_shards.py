"""Splits stored tensors into one shard for each tensor-parallel rank, and joins them again.

The files of all ranks are filled side by side (`Output.write_torch_files`), so that each tensor is read once for all of
them. A `stored` config has the vocabulary size of the files: padded to a multiple of tp, or further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.io import digest, torch_files
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import common_dtype
from megatron_ligo.checkpoint.reader import WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding import tensor_parallel
from megatron_ligo.sharding.fused_tensors import StoredTensor


def pad_vocab_size(model_config: ModelConfig, tp: int) -> ModelConfig:
    """Returns the config as tp ranks store it: with the smallest padded vocabulary that tp divides."""
    return replace(model_config, vocab_size=tensor_parallel.padded_vocab(model_config.vocab_size, tp))


class TpShards:
    """The shards of a source's tensors. Caches the canonical parts of the last tensor, which all ranks share."""

    def __init__(self, source: Reader, tp: int, stored: ModelConfig):
        self._source = source
        self._tp = tp
        self._stored = stored
        self._cache: tuple[object, list[Tensor]] = (None, [])

    def lazy_shard(self, item: StoredTensor, rank: int, kind: str = WEIGHT) -> LazyTensor:
        """Returns a rank's shard of a stored tensor, of shape `item.shape(stored, tp)`; read when it is written."""
        return LazyTensor(
            item.shape(self._stored, self._tp),
            common_dtype(self._source, item, kind),
            lambda: item.assemble_shard(self._parts(item, kind), self._stored, self._tp, rank),
        )

    def _parts(self, item: StoredTensor, kind: str) -> list[Tensor]:
        requested = (item.name, kind)
        if self._cache[0] != requested:
            self._cache = (None, [])
            self._cache = (requested, [self._part(item, key, kind) for key in item.keys])
        return self._cache[1]

    def _part(self, item: StoredTensor, key: str, kind: str) -> Tensor:
        tensor = self._source.read(key, kind)
        param = item.params[item.keys.index(key)]
        return tensor_parallel.pad_vocab(tensor, self._stored.vocab_size) if param.axes[0].space == "vocab" else tensor


def join_shards(
    item: StoredTensor, key: str, pieces: Sequence[Tensor], stored: ModelConfig, model_config: ModelConfig, where: str
) -> Tensor:
    """Joins the canonical tensor of a key, of its global unpadded shape, from every rank's shard of a stored tensor.

    A view if there is one rank and nothing to transpose. Raises CheckpointError (naming `where`) if replicas differ, or
    a shard's bytes are not those of its checksum.
    """
    param = item.params[item.keys.index(key)]
    pieces = [torch_files.check_stored(f"{key} ({item.name}, {where})", piece) for piece in pieces]
    if item.tp_dim is None:
        pieces = [check_replicas(pieces, f"{key} ({item.name}, {where})")]
    parts = [item.extract_shard(piece, key, stored, len(pieces)) for piece in pieces]
    whole = tensor_parallel.unshard(parts, param, stored)
    if param.axes[0].space == "vocab":
        whole = whole.narrow(0, 0, model_config.vocab_size)
    return whole


def check_replicas(pieces: Sequence[Tensor], where: str, first: int = 0) -> Tensor:
    """Returns the first of several tensors of one shape, which must have equal bits; `first` is its rank.

    Raises CheckpointError naming the ranks that differ.
    """
    others = [str(rank) for rank, piece in enumerate(pieces[1:], first + 1) if not digest.same_bits(pieces[0], piece)]
    if others:
        hint = "The ranks diverged in training, or files of two checkpoints are mixed."
        found = f"other bits on rank {', '.join(others)}"
        raise CheckpointError(Problem(where, f"the bits of rank {first}", found, hint))
    return pieces[0]
