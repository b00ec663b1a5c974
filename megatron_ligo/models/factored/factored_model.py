"""The factored model for DeepSpeed: one module (PP = 1), or a pipeline of stages (PP > 1).

Legend: s tokens, b batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_ligo.common import library_log
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.embedding_and_head import FactoredHead, embedding_class
from megatron_ligo.models.factored.factored_layer import FactoredLayer, SharedMaps
from megatron_ligo.models.factored.map_parameters import MapParameters
from megatron_ligo.models.factored.step_state import StepState
from megatron_ligo.models.loss import compute_loss
from megatron_ligo.sharding.pipeline_layers import stage_bounds

TIED_MAPS = "maps"


class FactoredModel(nn.Module):
    """tokens, labels (b, s) int64, mask (b, s) -> mean loss; in training, mixed with the teacher's divergence, if any.

    A classifier takes images (b, channels, side, side) and labels (b, 1). The parameters are the operator's.
    """

    def __init__(self, context: FactoredContext):
        super().__init__()
        self.context = context
        self.step_state = StepState(context)
        self.shared = SharedMaps(context, self.step_state)
        self.embedding = embedding_class(context.operator.arch)(context, self.step_state)
        layers = range(context.operator.large.num_layers)
        self.layers = nn.ModuleList(FactoredLayer(context, self.step_state, j) for j in layers)
        self.head = FactoredHead(context, self.step_state)
        _connect_layers(self.step_state, self.factored_layers())

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the mean loss, a scalar."""
        logits = self.logits(tokens)
        teacher = self.context.teacher if self.training else None
        # Before the loss: Megatron-core's cross entropy modifies the logits in place.
        divergence = teacher.kl_divergence(logits, tokens, mask) if teacher else None
        loss = fit_loss(logits, labels, mask, self.context)
        return loss if divergence is None else (1 - teacher.weight) * loss + teacher.weight * divergence

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) -> this rank's columns of the logits (s, b, padded vocabulary / tp)."""
        h = self.embedding(self.shared(tokens))
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    def shared_maps(self) -> MapParameters:
        return self.shared.maps

    def factored_layers(self) -> list[FactoredLayer]:
        return list(self.layers)


class FactoredPipeline(PipelineModule):
    """The factored model as stages. Its parameters have the same names as those of `FactoredModel`.

    The shared maps are one tied module, the first layer of each stage: DeepSpeed sums their gradients over the stages
    and saves them.
    """

    def __init__(self, context: FactoredContext):
        mesh = context.mesh
        num_layers = context.operator.large.num_layers
        self.bounds = stage_bounds(num_layers, mesh.pp)
        self.context = context
        self.step_state = StepState(context)
        specs, self.part_bounds = self._specs(num_layers)
        with library_log.log_prints("deepspeed"):
            topology = PipeModelDataParallelTopology(num_pp=mesh.pp, num_mp=mesh.tp, num_dp=mesh.replicas)
            super().__init__(specs, topology=topology, loss_fn=self._loss)
        _connect_layers(self.step_state, self.factored_layers())

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        prefixes = {f"tied_modules.{TIED_MAPS}": "shared"} | {
            index: f"layers.{layer.layer}" for index, layer in self.named_children() if isinstance(layer, FactoredLayer)
        }
        for name, parameter in super().named_parameters(*args, **kwargs):
            prefix = next(prefix for prefix in prefixes if name.startswith(f"{prefix}."))
            yield prefixes[prefix] + name.removeprefix(prefix), parameter

    def _specs(self, num_layers: int) -> tuple[list[LayerSpec], list[int]]:
        """Returns DeepSpeed's layer specs, and the bounds of the stages in them."""
        context, state = self.context, self.step_state
        tied = [name for name, _ in SharedMaps(context, state).named_parameters()]
        specs: list[LayerSpec] = []
        part_bounds = [0]
        for stage, (first, last) in enumerate(zip(self.bounds, self.bounds[1:], strict=False)):
            specs.append(TiedLayerSpec(TIED_MAPS, SharedMaps, context, state, tied_weight_attr=tied))
            if stage == 0:
                specs.append(LayerSpec(embedding_class(context.operator.arch), context, state))
            specs += [LayerSpec(FactoredLayer, context, state, j) for j in range(first, last)]
            if last == num_layers:
                specs.append(LayerSpec(FactoredHead, context, state))
            part_bounds.append(len(specs))
        return specs, part_bounds

    def _partition_layers(self, method: str = "explicit") -> None:
        self.parts = self.part_bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # DeepSpeed broadcasts the parameter itself; recorded by autograd, that would warn in each backward pass.
        super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list:
        # Other stages have no gradient for a map that only the head uses. DeepSpeed would skip them in the all-reduce,
        # and the last stage would hang.
        weights_and_groups = super().get_tied_weights_and_groups()
        for weight, _ in weights_and_groups:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return weights_and_groups

    def _loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        return fit_loss(logits, *labels, self.context)

    def shared_maps(self) -> MapParameters:
        return self.tied_modules[TIED_MAPS].maps

    def factored_layers(self) -> list[FactoredLayer]:
        return [module for module in self.forward_funcs if isinstance(module, FactoredLayer)]


def _connect_layers(state: StepState, layers: list[FactoredLayer]) -> None:
    """Registers the layers of this process, which mix and build their tensors together."""
    state.set_layers({layer.layer: layer.depth for layer in layers})
    for layer in layers:
        # A tuple, so that torch does not register the layers as submodules.
        layer.siblings = tuple(other for other in layers if other is not layer)


def fit_loss(logits: Tensor, labels: Tensor, mask: Tensor, context: FactoredContext) -> Tensor:
    """Returns the mean cross entropy, a scalar. logits (s, b, padded vocabulary / tp); labels, mask (b, s)."""
    return compute_loss(logits, labels, mask, context.operator.large.vocab_size, context.mesh)
