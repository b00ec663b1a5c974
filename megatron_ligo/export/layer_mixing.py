"""Depth maps of a growth in which every large layer reads every small one, for many large layers at once.

One large layer at a time, the whole small model would be read for each of them. A layer is mixed together with the next
ones instead, as layers are read in order: each small tensor is read once for all of them, and one product of matrices
mixes each piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ligo.arch.spec import expert_index, key_pattern, layer_index
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.growth.operator import Operator

# Each product has this many rows, and columns that depend on the tensor alone: so its sums, and a hand-off's bytes,
# do not depend on how many layers are mixed at once.
LAYERS_AT_ONCE = 16
COLUMNS = 1 << 15
# The most bytes of mixed tensors that wait until they are read; with large layers, those of one.
WAITING_BYTES = 256 << 20
# Small tensors that are in memory at once: as many as fit into GROUP_BYTES, and at least MIN_GROUP.
GROUP_BYTES, MIN_GROUP = 64 << 20, 4


class DepthMixer:
    """Mixes the tensors of a small model's layers by the depth maps of an operator. `mix` is called key by key.

    device: where dense maps are applied.
    """

    def __init__(self, operator: Operator, source: Reader, device: torch.device) -> None:
        self._operator, self._source, self._device = operator, source, device
        small = operator.small
        sizes = (
            math.prod(param.shape(small)) for param in operator.arch.params if param.in_layer and param.exists(small)
        )
        layer_bytes = sum(sizes) * torch.float32.itemsize
        self._num_ahead = min(LAYERS_AT_ONCE, 1 + max(WAITING_BYTES // layer_bytes, 1))
        # By pattern of the key, and by layer.
        self._waiting: dict[str, dict[int, Tensor]] = {}

    def mix(self, key: str, layer_offset: int = 0) -> Tensor:
        """Returns `Operator.mix_layers` of a large key, (out small, in small), in fp32 or wider, on either device."""
        if layer_offset or not self._is_dense(key):
            return self._operator.mix_layers(key, self._source.read, layer_offset)
        layer, pattern = layer_index(key), key_pattern(key)
        if layer not in self._waiting.get(pattern, ()):
            # Layers that wait still are another process's, which shares the work.
            self._waiting[pattern] = self._mix_ahead(pattern, layer)
        return self._waiting[pattern].pop(layer)

    def _is_dense(self, key: str) -> bool:
        """True for a matrix if every large layer reads every small one, as it is stored, with a weight other than 0."""
        name, param = self._operator.depth_name(key), self._operator.arch.param(key)
        if name is None or len(param.axes) != 2 or expert_index(key) is not None or param.skips_first_layer:
            return False
        weights = self._operator.tensor(name)
        return weights.shape[1] > 1 and not weights.requires_grad and bool((weights != 0).all())

    def _mix_ahead(self, pattern: str, layer: int) -> dict[int, Tensor]:
        """Returns the mixed tensors of a layer and of those that are read next, by layer."""
        end = min(layer + self._num_ahead, self._operator.large.num_layers)
        name = self._operator.depth_name(pattern.format(layer, 0))
        mixed = self._mix(pattern, self._operator.tensor(name)[layer:end])
        return dict(zip(range(layer, end), mixed, strict=True))

    def _mix(self, pattern: str, weights: Tensor) -> list[Tensor]:
        """Mixes the tensors of some large layers: weights (layers, small layers) -> each (out small, in small)."""
        info = self._source.info(pattern.format(0, 0))
        dtype = torch.promote_types(info.dtype, torch.float32)
        size = math.prod(info.shape)
        rows = torch.zeros(LAYERS_AT_ONCE, weights.shape[1], dtype=dtype, device=self._device)
        rows[: len(weights)] = weights
        mixed = [torch.zeros(size, dtype=dtype, device=self._device) for _ in weights]
        group_size = max(GROUP_BYTES // (size * info.dtype.itemsize), MIN_GROUP)
        for numbers in torch.arange(weights.shape[1]).split(group_size):
            tensors = [self._source.read(pattern.format(number, 0)).reshape(-1) for number in numbers.tolist()]
            _add_products(mixed, rows[:, numbers], tensors)
        return [tensor.view(info.shape) for tensor in mixed]


def _add_products(mixed: Sequence[Tensor], rows: Tensor, tensors: Sequence[Tensor]) -> None:
    """Adds sum_i rows[j, i] tensors[i] to each mixed[j], both (size,). rows: (LAYERS_AT_ONCE, len(tensors))."""
    size = len(tensors[0])
    for start in range(0, size, COLUMNS):
        piece = slice(start, min(start + COLUMNS, size))
        stacked = rows.new_empty(len(tensors), piece.stop - start)
        for row, tensor in zip(stacked, tensors, strict=True):
            row.copy_(tensor[piece])
        for target, added in zip(mixed, rows @ stacked, strict=False):
            target[piece] += added
