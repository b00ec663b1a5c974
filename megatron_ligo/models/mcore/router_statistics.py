"""What routers choose in training: the load of each expert, how sure the choices are, and tokens that none takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_ligo.distributed import device

# Columns of metrics.jsonl. A load of 1 is an equal share; that of one expert, `expert_load_3`, is the layers' mean.
ROUTER_ENTROPY, DROPPED_TOKENS = "router_entropy", "dropped_tokens"
SMALLEST_LOAD, LARGEST_LOAD, EXPERT_LOAD = "expert_load_min", "expert_load_max", "expert_load_"


class RouterStatistics:
    """Counts the choices of a module's routers in training passes, from one `take` to the next."""

    def __init__(self, module: nn.Module, num_layers: int):
        self.routers = [router for router in module.modules() if isinstance(router, TopKRouter)]
        self.num_layers = num_layers
        for router in self.routers:
            router.routing = self._counting(router, router.routing)
        # By layer: tokens of each expert, the sum of the tokens' entropies, and the tokens.
        self._sums: Tensor | None = None

    def _counting(self, router: TopKRouter, routing: Callable[..., tuple]) -> Callable[..., tuple]:
        def count(logits: Tensor, *arguments: object, **options: object) -> tuple[Tensor, Tensor]:
            probabilities, chosen = routing(logits, *arguments, **options)
            if router.training and torch.is_grad_enabled():
                self._add(router.layer_number - 1, logits.detach().reshape(chosen.shape), chosen)
            return probabilities, chosen

        return count

    @torch.no_grad()
    def _add(self, layer: int, logits: Tensor, chosen: Tensor) -> None:
        """Adds a pass over tokens: logits and the choice of experts, (tokens, experts)."""
        tokens, num_experts = chosen.shape
        if self._sums is None:
            shape = self.num_layers, num_experts + 2
            self._sums = torch.zeros(shape, dtype=torch.float64, device=device.current_device())
        log_scores = logits.float().log_softmax(dim=-1)
        row = self._sums[layer]
        row[:num_experts] += chosen.sum(dim=0)
        row[num_experts] -= (log_scores.exp() * log_scores).sum()
        row[num_experts + 1] += tokens

    def take(self, num_experts: int, top_k: int) -> dict[str, float]:
        """Returns the columns of metrics.jsonl for the passes since the last call, over all ranks. Collective.

        The entropy is the mean of the tokens' over all experts, relative to that of equal scores. A recomputed layer
        counts twice, which changes no mean; its dropped tokens count twice too.
        """
        sums = self._sums
        if sums is None:
            shape = self.num_layers, num_experts + 2
            sums = torch.zeros(shape, dtype=torch.float64, device=device.current_device())
        self._sums = None
        dist.all_reduce(sums)
        sums = sums.cpu()
        tokens = sums[:, num_experts + 1]
        loads = sums[:, :num_experts] * num_experts / (tokens * top_k).clamp(min=1)[:, None]
        entropy = sums[:, num_experts].sum() / tokens.sum().clamp(min=1) / math.log(max(num_experts, 2))
        return {
            ROUTER_ENTROPY: float(entropy),
            SMALLEST_LOAD: float(loads.min()),
            LARGEST_LOAD: float(loads.max()),
            DROPPED_TOKENS: float(tokens.sum() * top_k - sums[:, :num_experts].sum()),
        } | {f"{EXPERT_LOAD}{expert}": float(load) for expert, load in enumerate(loads.mean(dim=0))}
