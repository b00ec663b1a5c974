"""The grown model as DeepSpeed takes it: one module (PP = 1), or a pipeline of stages (PP > 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.embedding_and_head import FactoredHead, input_class
from megatron_ligo.models.factored.factored_layer import FactoredLayer, SharedMaps
from megatron_ligo.models.factored.map_parameters import MapParameters
from megatron_ligo.models.loss import language_model_loss
from megatron_ligo.sharding.tensor_parallel import stage_bounds


class FactoredModel(nn.Module):
    """tokens, labels (b, s) int64, mask (b, s) -> mean loss; in training, with the teacher's part if there is one.

    A classifier is given images (b, channels, side, side) and labels (b, 1). Its parameters are the operator's.
    """

    def __init__(self, runtime: FactoredContext):
        super().__init__()
        self.runtime = runtime
        self.shared = SharedMaps(runtime)
        self.embedding = input_class(runtime.operator.arch)(runtime)
        self.layers = nn.ModuleList(FactoredLayer(runtime, j) for j in range(runtime.operator.large.num_layers))
        self.head = FactoredHead(runtime)

    def forward(self, tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = self.logits(tokens)
        teacher = self.runtime.teacher if self.training else None
        # Before the loss: Megatron-core's works on the logits in place.
        apart = teacher.kl_divergence(logits, tokens, mask) if teacher else None
        loss = loss_of(logits, labels, mask, self.runtime)
        return loss if apart is None else (1 - teacher.weight) * loss + teacher.weight * apart

    def logits(self, tokens: Tensor) -> Tensor:
        """(b, s) -> (s, b, padded vocabulary / tp)."""
        h = self.embedding(self.shared(tokens))
        for layer in self.layers:
            h = layer(h)
        return self.head(h)

    def shared_maps(self) -> MapParameters:
        return self.shared.maps

    def grown_layers(self) -> list[FactoredLayer]:
        return list(self.layers)


class FactoredPipeline(PipelineModule):
    """The same, cut into stages. The shared maps are one tied module, the first layer of each stage, so that
    DeepSpeed adds up their gradients over the stages and saves them. Parameters bear the same names as those of the
    one module."""

    def __init__(self, runtime: FactoredContext):
        mesh = runtime.mesh
        layers = runtime.operator.large.num_layers
        self.cuts = stage_bounds(layers, mesh.pp)
        self.runtime = runtime
        specs, self.part_bounds = self._specs(layers)
        topology = PipeModelDataParallelTopology(num_pp=mesh.pp, num_mp=mesh.tp, num_dp=mesh.dp)
        super().__init__(specs, topology=topology, loss_fn=self._loss)

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        own = {"tied_modules.maps": "shared"} | {
            index: f"layers.{layer.layer}" for index, layer in self.named_children() if isinstance(layer, FactoredLayer)
        }
        for name, parameter in super().named_parameters(*args, **kwargs):
            prefix = next(prefix for prefix in own if name.startswith(f"{prefix}."))
            yield own[prefix] + name.removeprefix(prefix), parameter

    def _specs(self, layers: int) -> tuple[list[LayerSpec], list[int]]:
        runtime = self.runtime
        tied = [name for name, _ in SharedMaps(runtime).named_parameters()]
        specs: list[LayerSpec] = []
        bounds = [0]
        for stage, (first, last) in enumerate(zip(self.cuts, self.cuts[1:], strict=False)):
            specs.append(TiedLayerSpec("maps", SharedMaps, runtime, tied_weight_attr=tied))
            if stage == 0:
                specs.append(LayerSpec(input_class(runtime.operator.arch), runtime))
            specs += [LayerSpec(FactoredLayer, runtime, j) for j in range(first, last)]
            if last == layers:
                specs.append(LayerSpec(FactoredHead, runtime))
            bounds.append(len(specs))
        return specs, bounds

    def _partition_layers(self, method: str = "explicit") -> None:
        self.parts = self.part_bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # DeepSpeed broadcasts the parameter itself: recorded, it would warn at each backward pass.
        super()._synchronize_tied_weights()

    def get_tied_weights_and_groups(self) -> list:
        # Of a map that the head alone reads the other stages have no gradient: DeepSpeed would leave them out of the
        # sum, and hang the last one.
        found = super().get_tied_weights_and_groups()
        for weight, _ in found:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return found

    def _loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(logits, *labels, self.runtime)

    def shared_maps(self) -> MapParameters:
        return self.tied_modules["maps"].maps

    def grown_layers(self) -> list[FactoredLayer]:
        return [module for module in self.forward_funcs if isinstance(module, FactoredLayer)]


def loss_of(logits: Tensor, labels: Tensor, mask: Tensor, runtime: FactoredContext) -> Tensor:
    return language_model_loss(logits, labels, mask, runtime.operator.large.vocab_size, runtime.mesh.tp_rank)
