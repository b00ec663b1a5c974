"""What routers choose in training: the load of each expert, how sure the choices are, and tokens that none takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed import device

# Columns of metrics.jsonl. A load of 1 is an equal share; that of one expert, `expert_load_3`, is the layers' mean.
ROUTER_ENTROPY, DROPPED_TOKENS = "router_entropy", "dropped_tokens"
SMALLEST_LOAD, LARGEST_LOAD, EXPERT_LOAD = "expert_load_min", "expert_load_max", "expert_load_"


class RouterStatistics:
    """Counts the choices of a module's routers in training passes, from one `take` to the next."""

    def __init__(self, module: nn.Module, model_config: ModelConfig):
        self.num_experts, self.top_k = model_config.num_experts, model_config.top_k
        self.shape = model_config.num_layers, self.num_experts + 2
        for router in module.modules():
            if isinstance(router, TopKRouter):
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
        if self._sums is None:
            self._sums = self._zeros()
        log_scores = logits.float().log_softmax(dim=-1)
        row = self._sums[layer]
        row[:-2] += chosen.sum(dim=0)
        row[-2] -= (log_scores.exp() * log_scores).sum()
        row[-1] += len(chosen)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64, device=device.current_device())

    def take(self) -> dict[str, float]:
        """Returns the columns of metrics.jsonl for the passes since the last call, over all ranks. Collective.

        The entropy is the mean of the tokens' over all experts, relative to that of equal scores. A recomputed layer
        counts twice, which changes no mean; its dropped tokens count twice too.
        """
        sums, self._sums = self._zeros() if self._sums is None else self._sums, None
        dist.all_reduce(sums)
        choices, entropies, tokens = sums.cpu().split((self.num_experts, 1, 1), dim=1)
        loads = choices * self.num_experts / (tokens * self.top_k).clamp(min=1)
        entropy = entropies.sum() / tokens.sum().clamp(min=1) / math.log(max(self.num_experts, 2))
        return {
            ROUTER_ENTROPY: float(entropy),
            SMALLEST_LOAD: float(loads.min()),
            LARGEST_LOAD: float(loads.max()),
            DROPPED_TOKENS: float(tokens.sum() * self.top_k - choices.sum()),
        } | {f"{EXPERT_LOAD}{expert}": float(load) for expert, load in enumerate(loads.mean(dim=0))}
