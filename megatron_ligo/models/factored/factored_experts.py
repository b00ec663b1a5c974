"""A layer's router and experts, computed from factors: tokens travel in the small model's width.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model; E1, E2 experts of the two; f, F widths
of one expert; G shards (growth/experts.py).

A large expert e has the weights sum_i a[e, i] W_i of the small experts i, with the map of the space `expert` as a. The
products of W_i with the ffn's map are built once per step, for all shards: the experts of one copy, and all copies,
share them. Of a dense model (E1 = 1) no expert has a weight of its own: a[e] multiplies its outputs.

Neurons that start anew (drop-upcycling) have the large width, and so have their tokens.

TP divides the G F rows of the ffn's map, so a rank has a range of the rows of each shard, which may be empty: experts
are sums over their rows, and the ranks' outputs are summed.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ligo.arch.spec import ParamSpec, Role
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth.experts import num_shards
from megatron_ligo.growth.width_maps import apply_map
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.dropped_neurons import DroppedNeurons
from megatron_ligo.models.factored.factored_linears import FactoredModule
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.mcore.expert_routing import build_dispatcher
from megatron_ligo.models.mcore.layer_spec import get_ffn_activation


class FactoredExperts(FactoredModule):
    """(s or s / tp, b, D2), normalised -> the same shape. Returns (y, None), as Megatron-core's blocks do.

    specs: the router's; those of the experts and of the shared expert's weight, unless they write nothing at first:
    such a block is not computed. The shared expert's linears are separate modules, set below `shared_experts`.
    """

    def __init__(self, context: FactoredContext, specs: list[ParamSpec], layer: int, config: TransformerConfig):
        super().__init__()
        self.context = context
        self.specs = {spec.role: spec for spec in specs}
        operator, mesh = context.operator, context.mesh
        self.shards = num_shards(operator.small, operator.large)
        neurons = [_local_neurons(shard, self.shards, operator.large.ffn_size, mesh) for shard in range(self.shards)]
        first = mesh.tp_rank * (self.shards * operator.large.ffn_size // mesh.tp)
        starts = [shard * operator.large.ffn_size + part.start - first for shard, part in enumerate(neurons)]
        self.rows = [slice(start, start + len(part)) for start, part in zip(starts, neurons, strict=True)]
        num_local = operator.large.num_experts // mesh.ep
        self.local = range(mesh.ep_rank * num_local, (mesh.ep_rank + 1) * num_local)
        self.activation = get_ffn_activation(operator.large)
        self.router = TopKRouter(config, get_default_pg_collection())
        # Its weight is grown.
        self.router._parameters.clear()
        self.router.set_layer_number(layer + 1)
        self.dispatcher = build_dispatcher(config, self.local)
        self.has_experts = Role.EXPERT_DOWN in self.specs
        self.dropped: list[DroppedNeurons] = []
        if operator.settings.expert_drop:
            draw = partial(DroppedNeurons.draw, operator, self.specs, layer)
            self.dropped = [draw(expert, neurons[expert % self.shards]) for expert in self.local]
        self.shared_experts = nn.Module() if Role.SHARED_EXPERT_WEIGHT in self.specs else None

    def build(self, mixed, maps, dtype):
        """Returns the router, (E2, D2 or D1), the shared expert's weight, (1, D1), then for each shard n of this rank's
        rows: gate and up (E1, 2 n, D1), and down (E1, D1, n)."""
        router = mixed[self.specs[Role.ROUTER].key]
        if not self.context.operator.draws_routers:
            router = map_for_use(maps, "expert", False).dense().to(router) @ router
        shared = [] if self.shared_experts is None else [mixed[self.specs[Role.SHARED_EXPERT_WEIGHT].key]]
        if not self.has_experts:
            return [router, *shared]
        gate, up = (self._grow(mixed, maps, role, 0) for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
        down = self._grow(mixed, maps, Role.EXPERT_DOWN, 1) * self.shards
        fused = [torch.cat([gate[:, rows], up[:, rows]], dim=1) for rows in self.rows]
        return [router, *shared, *fused, *(down[:, :, rows] for rows in self.rows)]

    def _grow(self, mixed: dict[str, Tensor], maps: dict, role: Role, dim: int) -> Tensor:
        """Applies the ffn's map to dim `dim` of the small experts: (E1, f, D1) or (E1, D1, f) -> G F / tp for f."""
        spec = self.specs[role]
        matrix, lift = self.context.map_for(maps, spec, dim)
        return apply_map(mixed[spec.key], 1 + dim, matrix, lift)

    def forward(self, x: Tensor, padding_mask: None = None) -> tuple[Tensor, None]:
        (router, *weights), maps = self.operands()
        u = map_for_use(maps, "residual", True).apply_transposed(x).contiguous()
        seen = x if self.context.operator.draws_routers else u
        chances, chosen = self.router.routing(F.linear(seen.float(), router.float()))
        y = None
        if self.shared_experts is not None:
            weight, *weights = weights
            hidden, _ = self.shared_experts.linear_fc1(x)
            y = self.shared_experts.linear_fc2(hidden)[0] * F.linear(u, weight.to(u)).sigmoid()
        if not self.has_experts:
            # The load-balancing loss is a part of the scores' gradient.
            return y + (0 * chances.sum()).to(y), None
        routed = self._run_experts(x, u, chances, chosen, weights, maps)
        return routed if y is None else routed + y, None

    def _run_experts(
        self, x: Tensor, u: Tensor, chances: Tensor, chosen: Tensor, weights: list[Tensor], maps: dict
    ) -> Tensor:
        """Returns the experts' outputs, in x's shape. u: x in the small width; weights: those of `build`."""
        dispatcher, width = self.dispatcher, u.shape[-1]
        sent = torch.cat([u, x], dim=-1) if self.dropped else u
        tokens, chances = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(sent, chosen, chances))
        tokens, counts, chances = dispatcher.dispatch_postprocess(tokens, chances)
        mixture = map_for_use(maps, "expert", False).dense().to(u)[self.local.start : self.local.stop]
        parts = zip(tokens.split(counts.tolist()), chances.split(counts.tolist()), strict=True)
        outputs = []
        for number, (expert, (part, weight_of_part)) in enumerate(zip(self.local, parts, strict=True)):
            dropped = self.dropped[number] if self.dropped else None
            kept = None if dropped is None else dropped.kept
            shard = weights[expert % self.shards :: self.shards]
            output = self._run(part[:, :width], weight_of_part, mixture[number], *shard, kept)
            if dropped is not None:
                output = torch.cat([output, dropped.run(part[:, width:], weight_of_part, self.activation)], dim=-1)
            outputs.append(output)
        combined = dispatcher.token_combine(dispatcher.combine_preprocess(torch.cat(outputs)))
        z = dispatcher.combine_postprocess(combined)
        grown = map_for_use(maps, "residual", False).apply(z[..., :width])
        return grown + z[..., width:] if self.dropped else grown

    def _run(
        self, u: Tensor, chances: Tensor, weights: Tensor, fused: Tensor, down: Tensor, kept: Tensor | None
    ) -> Tensor:
        """Returns an expert's outputs (n, D1) for tokens u (n, D1), times their chances (n,).

        weights: (E1,); fused, down: those of `build` for the expert's shard. kept: of `DroppedNeurons`.
        """
        is_lone = len(weights) == 1
        if not is_lone:
            fused, down = (torch.einsum("i,i...->...", weights, part) for part in (fused, down))
        hidden = F.linear(u, fused[0]) * weights[0] if is_lone else F.linear(u, fused)
        hidden = (self.activation(hidden) * chances[:, None]).to(u.dtype)
        hidden = hidden if kept is None else hidden * kept.to(hidden)
        return F.linear(hidden, down[0]) * weights[0] if is_lone else F.linear(hidden, down)


def _local_neurons(shard: int, shards: int, width: int, mesh: Mesh) -> range:
    """Returns which neurons of a shard this rank has, by their numbers in the shard."""
    count = shards * width // mesh.tp
    first = mesh.tp_rank * count - shard * width
    start, stop = (min(max(row, 0), width) for row in (first, first + count))
    return range(start, stop)
