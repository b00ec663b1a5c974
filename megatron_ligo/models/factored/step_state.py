"""State that the modules of a factored model share within an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
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
        self._taken: dict[int, dict[str, Tensor]] = {}  # layers that are not yet taken
        self._built: dict[int, list[Tensor]] = {}

    def clear(self) -> None:
        self._taken.clear()
        self._built.clear()

    def take(self, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the depth-mixed small tensors of a large layer, by key pattern, once per build: TP-sharded weights in
        dtype, the others in fp32, all in the small model's (global) shapes."""
        if layer not in self._taken:
            batch, mixed = self._mix(layer, dtype)
            parts = zip(*(tensor.unbind(0) for tensor in mixed.values()), strict=True)
            self._taken = {j: dict(zip(mixed, part, strict=True)) for j, part in zip(batch, parts, strict=True)}
        return self._taken.pop(layer)

    def take_built(
        self, layer: int, dtype: torch.dtype, build: Callable[[dict[str, Tensor]], list[Tensor]]
    ) -> list[Tensor]:
        """Returns what a large layer builds from its mixed tensors, in the shapes of `build`, once per build.

        build: takes the tensors of `take` for several layers, stacked along a first dim, and returns stacks.
        """
        if layer not in self._built:
            batch, mixed = self._mix(layer, dtype)
            parts = zip(*(tensor.unbind(0) for tensor in build(mixed)), strict=True)
            self._built = dict(zip(batch, map(list, parts), strict=True))
        return self._built.pop(layer)

    def _mix(self, layer: int, dtype: torch.dtype) -> tuple[list[int], dict[str, Tensor]]:
        """Mixes a layer and those after it; returns them, and by key the mixed tensors (layers, *small shape)."""
        order, source = list(self.depths), self.context.source
        first = order.index(layer)
        batch = order[first : first + LAYERS_MIXED_AT_ONCE]
        split, whole = (torch.stack(depths) for depths in zip(*(self.depths[j]() for j in batch), strict=True))
        if self.context.sequence_parallel:
            whole = copy_to(whole, self.context.mesh.tp_group)
        return batch, source.mix_split(split, dtype) | source.mix_whole(whole)


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
