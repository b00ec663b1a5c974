"""The large model in its factored form: real Megatron-core layers whose linears run on maps and mixed small weights.

No grown matrix is ever built, nor its gradient (places.py). Legend: s sequence, b batch, D2 large hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_ligo.arch.spec import ParamSpec
from megatron_ligo.growth.linear_maps import LinearMap
from megatron_ligo.growth.operator import Operator
from megatron_ligo.models.factored.context import FactoredContext, StepCache, stale
from megatron_ligo.models.factored.factored_linears import (
    FactoredLinear,
    FactoredModule,
    FactoredSubmodule,
    passed_on,
    place_kind,
)
from megatron_ligo.models.factored.map_parameters import DepthParameters, MapParameters
from megatron_ligo.models.mcore.layer_calls import checkpointed
from megatron_ligo.models.mcore.layer_spec import (
    BuildOptions,
    activation,
    layer_class,
    layer_spec,
    mlp_submodules,
    transformer_config,
)


class SharedMaps(nn.Module):
    """The shared maps as the first layer of a stage: passes its input on, and lays the maps out for the others."""

    def __init__(self, runtime: FactoredContext):
        super().__init__()
        self.runtime = runtime
        self.maps = runtime.shared_maps = MapParameters(runtime.operator, runtime.mesh, None, runtime.sequence_parallel)
        self.seen = None
        self.once = StepCache()

    def forward(self, x: Tensor) -> Tensor:
        runtime = self.runtime
        if stale(self, runtime):
            tensors = self.maps(runtime.dtype)
            self.once.renew(tensors)
            runtime.shared_once = self.maps.matrices(tensors)
            # What an interrupted pass has left is stale as well.
            runtime.mixed.clear()
        if runtime.gradients_each:
            runtime.shared = self.maps(runtime.dtype)
        else:
            runtime.shared = self.once.take(runtime.micro_batches)
        return x


class FactoredLayer(nn.Module):
    """A large layer: a layer of Megatron-core's modules run on factors. Parameters: its depth maps, its own maps."""

    def __init__(self, runtime: FactoredContext, layer: int):
        super().__init__()
        self.runtime = runtime
        self.layer = layer
        self.seen = None
        self.once = StepCache()
        operator = runtime.operator
        self.maps = MapParameters(operator, runtime.mesh, layer, runtime.sequence_parallel)
        self.depth = DepthParameters(operator, layer, runtime.source.split_rows, runtime.source.whole_rows)
        runtime.depths[layer] = self.depth
        build = BuildOptions(runtime.dtype, runtime.mesh.tp, runtime.sequence_parallel)
        config = transformer_config(operator.large, build)
        # The place after it applies it (places.py): Megatron-core's mlp passes what it is given on.
        config.gated_linear_unit, config.activation_func = False, passed_on
        self.block = layer_class(operator.large)(
            config, factored_layer_spec(operator).submodules, layer_number=layer + 1
        )
        self.places = self._places(config)

    def _places(self, config) -> list[FactoredSubmodule]:
        rows: dict[str, list[ParamSpec]] = {}
        for row in self.runtime.operator.arch.layer_rows(self.runtime.operator.large):
            path = row.slots["mcore"].name.partition("layers.{}.")[2].rpartition(".")[0]
            rows.setdefault(path, []).append(row)
        made = []
        for path, members in rows.items():
            kind = place_kind(members)
            made.append(kind(self.block.get_submodule(path), members, self.layer, self.runtime, config))
        by_module = {place.module: place for place in made}
        if self.runtime.operator.arch.norm_first:
            for norm, reader in self._norms():
                by_module[norm].reader = by_module[reader]
        by_module[self.block.mlp.linear_fc2].before = activation(self.runtime.operator.large)
        return made

    def _norms(self) -> list[tuple[FactoredModule, FactoredModule]]:
        """Each norm with the linear that alone reads it."""
        block = self.block
        return [
            (block.input_layernorm, block.self_attention.linear_qkv),
            (block.pre_mlp_layernorm, block.mlp.linear_fc1),
        ]

    def forward(self, h: Tensor) -> Tensor:
        """h: (s, b, D2) -> (s, b, D2), in the runtime's dtype."""
        runtime = self.runtime
        if stale(self, runtime):
            self.once.renew(self._build())
        tensors = self.once.take(runtime.micro_batches)
        if runtime.recompute and torch.is_grad_enabled():
            return checkpointed(self._run, h, *runtime.shared, *tensors)
        return self._run(h, *runtime.shared, *tensors)

    def _build(self) -> list[Tensor]:
        """What is built once a step: the layer's own maps, then for each place, in order, its tensors."""
        runtime = self.runtime
        built = self.maps(runtime.dtype)
        maps = runtime.shared_once | self.maps.matrices(built)
        mixed = runtime.mixed_rows(self.layer)
        for place in self.places:
            tensors = place.build(mixed, maps)
            place.count = len(tensors)
            built += tensors
        return built

    def _run(self, h: Tensor, *tensors: Tensor) -> Tensor:
        shared_maps, rest = self.runtime.shared_maps, list(tensors)
        maps: dict[str, LinearMap] = {}
        for module in (shared_maps, self.maps):
            count = sum(map(len, module.learned.values()))
            maps |= module.matrices(rest[:count])
            rest = rest[count:]
        for place in self.places:
            mine, rest = rest[: place.count], rest[place.count :]
            place.module.run = place.bound(mine, maps)
        out, _ = self.block(h, attention_mask=None, rotary_pos_emb=self.runtime.positions(h))
        for place in self.places:
            place.release()
        return out


def factored_layer_spec(operator: Operator):
    """The layer spec with every module that holds a row's tensor replaced by an empty place."""
    spec = layer_spec(operator.large)
    attention, mlp = spec.submodules.self_attention.submodules, mlp_submodules(spec)
    spec.submodules.input_layernorm = FactoredModule
    spec.submodules.pre_mlp_layernorm = FactoredModule
    attention.linear_qkv = attention.linear_proj = FactoredLinear
    mlp.linear_fc1 = mlp.linear_fc2 = FactoredLinear
    return spec
