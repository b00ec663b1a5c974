"""A layer's router and experts, computed from factors: tokens travel in the small model's width.

Legend: s tokens, b batch; D1, D2 hidden size of the small and the large model; E1, E2 experts of the two; f, F widths
of one expert; G shards (growth/experts.py).

A large expert e has the weights sum_i a[e, i] W_i of the small experts i, with the map of the space `expert` as a. The
products of W_i with the ffn's map are built once per step, for all shards: the experts of one copy, and all copies,
share them. Of a dense model (E1 = 1) no expert has a weight of its own: a[e] multiplies its outputs.

TP divides the G F rows of the ffn's map, so a rank has a range of the rows of each shard, which may be empty: experts
are sums over their rows, and the ranks' outputs are summed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Role
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.growth.experts import num_shards
from megatron_ligo.growth.width_maps import apply_map
from megatron_ligo.models.factored.context import FactoredContext
from megatron_ligo.models.factored.factored_linears import FactoredModule
from megatron_ligo.models.factored.map_parameters import map_for_use
from megatron_ligo.models.mcore.layer_spec import get_ffn_activation


class FactoredExperts(FactoredModule):
    """(s or s / tp, b, D2), normalised -> the same shape. Returns (y, None), as Megatron-core's blocks do."""

    def __init__(self, context: FactoredContext, specs: list[ParamSpec], layer: int, config: TransformerConfig):
        super().__init__()
        self.context = context
        self.specs = {spec.role: spec for spec in specs}
        operator, mesh = context.operator, context.mesh
        self.shards = num_shards(operator.small, operator.large)
        self.rows = [_local_rows(shard, self.shards, operator.large.ffn_size, mesh) for shard in range(self.shards)]
        num_local = operator.large.num_experts // mesh.ep
        self.local = range(mesh.ep_rank * num_local, (mesh.ep_rank + 1) * num_local)
        self.activation = get_ffn_activation(operator.large)
        groups = get_default_pg_collection()
        self.router = TopKRouter(config, groups)
        # Its weight is grown.
        self.router._parameters.clear()
        self.router.set_layer_number(layer + 1)
        self.dispatcher = MoEAllGatherTokenDispatcher(num_local, list(self.local), config, groups)

    def build(self, mixed, maps, dtype):
        """Returns the router, (E2, D2 or D1), then for each shard n of this rank's rows: gate and up (E1, 2 n, D1), and
        down (E1, D1, n)."""
        router = mixed[self.specs[Role.ROUTER].key]
        if not self.context.operator.draws_routers:
            router = map_for_use(maps, "expert", False).dense().to(router) @ router
        gate, up = (self._grow(mixed, maps, role, 0) for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
        down = self._grow(mixed, maps, Role.EXPERT_DOWN, 1) * self.shards
        fused = [torch.cat([gate[:, rows], up[:, rows]], dim=1) for rows in self.rows]
        return [router, *fused, *(down[:, :, rows] for rows in self.rows)]

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
        dispatcher = self.dispatcher
        tokens, chances = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(u, chosen, chances))
        tokens, counts, chances = dispatcher.dispatch_postprocess(tokens, chances)
        mixture = map_for_use(maps, "expert", False).dense().to(u)[self.local.start : self.local.stop]
        parts = zip(tokens.split(counts.tolist()), chances.split(counts.tolist()), strict=True)
        outputs = [
            self._run(*part, mixture[number], *weights[expert % self.shards :: self.shards])
            for number, (expert, part) in enumerate(zip(self.local, parts, strict=True))
        ]
        combined = dispatcher.token_combine(dispatcher.combine_preprocess(torch.cat(outputs)))
        return map_for_use(maps, "residual", False).apply(dispatcher.combine_postprocess(combined)), None

    def _run(self, u: Tensor, chances: Tensor, weights: Tensor, fused: Tensor, down: Tensor) -> Tensor:
        """Returns an expert's outputs (n, D1) for tokens u (n, D1), times their chances (n,).

        weights: (E1,); fused, down: those of `build` for the expert's shard.
        """
        if len(weights) == 1:
            hidden = self.activation(F.linear(u, fused[0]) * weights[0])
            hidden = (hidden * chances[:, None]).to(u.dtype)
            return F.linear(hidden, down[0]) * weights[0]
        fused, down = (torch.einsum("i,i...->...", weights, part) for part in (fused, down))
        hidden = self.activation(F.linear(u, fused))
        return F.linear((hidden * chances[:, None]).to(u.dtype), down)


def _local_rows(shard: int, shards: int, width: int, mesh: Mesh) -> slice:
    """Returns which of this rank's rows of the ffn's map are a shard's."""
    count = shards * width // mesh.tp
    first = mesh.tp_rank * count
    start, end = (min(max(row - first, 0), count) for row in (shard * width, (shard + 1) * width))
    return slice(start, end)
