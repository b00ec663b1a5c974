"""Stored tensors that lie in pieces, one with each tensor-parallel rank: cut for writing, joined for reading.

The files of all ranks are filled side by side (`Output.torch_files`), so that a tensor is made once for all of them.
`stored` sizes are the model's with the vocabulary as the files have it: padded to a multiple of tp, or further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.io.file_layout import LazyTensor
from megatron_ligo.checkpoint.io.output import common_dtype
from megatron_ligo.checkpoint.reader import WEIGHT, Reader
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.sharding import tensor_parallel
from megatron_ligo.sharding.fused_tensors import StoredTensor


def pad_vocab_size(model_config: ModelConfig, tp: int) -> ModelConfig:
    """The sizes as tp ranks store them: with the smallest vocabulary that they can share."""
    return replace(model_config, vocab_size=tensor_parallel.padded_vocab(model_config.vocab_size, tp))


class TpShards:
    """What ranks store of a source's tensors. The parts of the tensor that was asked for last are kept."""

    def __init__(self, source: Reader, tp: int, stored: ModelConfig):
        self._source = source
        self._tp = tp
        self._stored = stored
        self._kept: tuple[object, list[Tensor]] = (None, [])

    def lazy_shard(self, item: StoredTensor, rank: int, kind: str = WEIGHT) -> LazyTensor:
        """One rank's piece, to be made when its turn comes."""
        return LazyTensor(
            item.shape(self._stored, self._tp),
            common_dtype(self._source, item, kind),
            lambda: item.assemble_shard(self._parts(item, kind), self._stored, self._tp, rank),
        )

    def _parts(self, item: StoredTensor, kind: str) -> list[Tensor]:
        wanted = (item.name, kind)
        if self._kept[0] != wanted:
            self._kept = (None, [])
            self._kept = (wanted, [self._part(item, key, kind) for key in item.keys])
        return self._kept[1]

    def _part(self, item: StoredTensor, key: str, kind: str) -> Tensor:
        tensor = self._source.read(key, kind)
        param = item.params[item.keys.index(key)]
        return tensor_parallel.pad_vocab(tensor, self._stored.vocab_size) if param.axes[0].space == "vocab" else tensor


def join_shards(
    item: StoredTensor, key: str, pieces: Sequence[Tensor], stored: ModelConfig, model_config: ModelConfig, where: str
) -> Tensor:
    """The canonical tensor of a key from what every rank stores; a view where there is one rank and nothing to turn.

    Raises CheckpointError (naming `where`) if ranks that should hold the same do not.
    """
    param = item.params[item.keys.index(key)]
    if item.tp_dim is None:
        pieces = [check_replicas(pieces, f"{key} ({item.name}, {where})")]
    parts = [item.extract_shard(piece, key, stored, len(pieces)) for piece in pieces]
    whole = tensor_parallel.unshard(parts, param, stored)
    if param.axes[0].space == "vocab":
        whole = whole.narrow(0, 0, model_config.vocab_size)
    return whole


def check_replicas(pieces: Sequence[Tensor], where: str, first: int = 0) -> Tensor:
    """One of several tensors, of rank `first` and those after it, that must have the same bits.

    Raises CheckpointError naming the ranks that differ.
    """
    others = [str(rank) for rank, piece in enumerate(pieces[1:], first + 1) if not digest.same_bits(pieces[0], piece)]
    if others:
        hint = "The ranks diverged in training, or files of two checkpoints are mixed."
        found = f"other bits on rank {', '.join(others)}"
        raise CheckpointError(Problem(where, f"the bits of rank {first}", found, hint))
    return pieces[0]
