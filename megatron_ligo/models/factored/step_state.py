"""State that the modules of a factored model share within an optimizer step."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ligo.distributed.collectives import copy_to
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.map_parameters import DepthParameters, MapLayout

# Enough to make a pass over the small weights compute-bound.
LAYERS_MIXED_AT_ONCE = 8


class LayerMixer:
    """Mixes the small layers into this process's large layers, several of them per pass.

    depths: depth maps by large layer, in order.
    """

    def __init__(self, context: FactoredContext, depths: Mapping[int, DepthParameters]):
        self.context = context
        self.depths = depths
        self._mixed: dict[int, dict[str, Tensor]] = {}  # layers that are not yet taken

    def clear(self) -> None:
        self._mixed.clear()

    def take(self, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the depth-mixed small tensors of a large layer, by key pattern, once per build: TP-sharded weights in
        dtype, the others in fp32, all in the small model's (global) shapes."""
        if layer not in self._mixed:
            order = list(self.depths)
            first = order.index(layer)
            batch = order[first : first + LAYERS_MIXED_AT_ONCE]
            split, whole = zip(*(self.depths[j]() for j in batch), strict=True)
            self._mixed = dict(zip(batch, self._mix(torch.stack(split), torch.stack(whole), dtype), strict=True))
        return self._mixed.pop(layer)

    def _mix(self, split: Tensor, whole: Tensor, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        source = self.context.source
        if self.context.sequence_parallel:
            whole = copy_to(whole, self.context.mesh.tp_group)
        cut = source.mix_split(split, dtype)
        return [tensors | others for tensors, others in zip(cut, source.mix_whole(whole), strict=True)]


class StepState:
    """The shared maps of the current micro-batch, and the tensors built once per step. Owned by the model.

    `SharedMaps` publishes the maps at the start of each micro-batch for the layers after it, as a pipeline passes only
    activations between modules. dtype: that of activations; `computing_in` changes it for an evaluation.
    """

    def __init__(self, context: FactoredContext):
        self.context = context
        self.dtype = context.dtype
        self.mixer = LayerMixer(context, {})
        self.step_maps: dict[str, LinearMap] = {}  # inputs of the tensors built once per step
        self.map_tensors: list[Tensor] = []  # of this micro-batch, in the order of map_layout
        self._map_layout: MapLayout | None = None
        self._steps = 0

    @property
    def map_layout(self) -> MapLayout:
        assert self._map_layout is not None, "SharedMaps runs before every layer"
        return self._map_layout

    def set_layers(self, depths: Mapping[int, DepthParameters]) -> None:
        """Registers the depth maps of this process's layers, by layer, once they are built."""
        self.mixer = LayerMixer(self.context, depths)

    def mark_updated(self) -> None:
        """Invalidates all tensors built from the parameters, after an optimizer step."""
        self._steps += 1

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Uses dtype for activations and mixed weights within the block."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def version(self, training: bool) -> Hashable:
        """Returns the version of tensors built now; None if every pass builds its own (no accumulation)."""
        every_pass = training and self.context.micro_batches == 1
        return None if every_pass else (self._steps, training, self.dtype)

    def start_step(self, maps: dict[str, LinearMap]) -> None:
        """Publishes the maps for the tensors built once per step, and drops the rest of an interrupted pass."""
        self.step_maps = maps
        self.mixer.clear()

    def start_micro_batch(self, layout: MapLayout, tensors: list[Tensor]) -> None:
        """Publishes the shared maps' tensors, in the shapes of MapParameters, for this micro-batch."""
        self._map_layout, self.map_tensors = layout, tensors

    def shared_maps(self) -> dict[str, LinearMap]:
        """Returns this micro-batch's shared maps, by side."""
        return self.map_layout.matrices(self.map_tensors)
