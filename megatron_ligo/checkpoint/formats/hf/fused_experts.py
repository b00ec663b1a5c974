"""Files that hold a layer's experts in one tensor: (experts, rows, columns), as transformers 5 holds them in memory."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf.shards import WeightShards
from megatron_ligo.checkpoint.formats.hf.tensor_files import TensorFile

FORMAT = "hf"


class ExpertParts(TensorFile):
    """The parts of fused tensors, each a view: part i of expert e is [e, i rows : (i + 1) rows], (rows, columns).

    parts: name -> (stored name, expert, part, number of parts).
    """

    def __init__(self, file: TensorFile, parts: dict[str, tuple[str, int, int, int]]):
        self._file = file
        self._parts = parts

    def names(self) -> Collection[str]:
        return self._parts.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        stored_name, _, _, count = self._parts[name]
        _, rows, columns = self._file.shape(stored_name)
        return rows // count, columns

    def dtype_name(self, name: str) -> str:
        return self._file.dtype_name(self._parts[name][0])

    def dtype(self, name: str) -> torch.dtype | None:
        return self._file.dtype(self._parts[name][0])

    def tensor(self, name: str) -> Tensor:
        stored_name, expert, part, count = self._parts[name]
        return self._file.tensor(stored_name)[expert].chunk(count)[part]


def split_experts(arch: Architecture, model_config: ModelConfig, shards: WeightShards) -> None:
    """Replaces each fused tensor of the right number of experts by its parts under the names of single experts."""
    for fused_name, roles in arch.fused_experts.items():
        for layer in range(model_config.num_layers):
            name = fused_name.format(layer)
            if name not in shards.names():
                continue
            shape = shards.shape(name)
            if len(shape) != 3 or shape[0] != model_config.num_experts or shape[1] % len(roles):
                # Reported as it stands: no such tensor is expected.
                continue
            keys = [arch.get(role).key for role in roles]
            parts = {
                arch.stored_name(key.format(layer, expert), model_config, FORMAT): (expert, part, len(roles))
                for expert in range(model_config.num_experts)
                for part, key in enumerate(keys)
            }
            shards.split(name, lambda file, stored, parts=parts: ExpertParts(file, _at(stored, parts)))


def _at(stored_name: str, parts: dict[str, tuple[int, int, int]]) -> dict[str, tuple[str, int, int, int]]:
    return {name: (stored_name, *place) for name, place in parts.items()}
