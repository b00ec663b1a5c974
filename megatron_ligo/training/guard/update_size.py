"""Estimates how much of the weights the next update changes, before it is applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.distributed import device

# Steps between two measurements. Adam's moments, and so the length of its direction, change slowly.
MEASURE_EVERY = 10
# Elements that are measured at once.
CHUNK = 1 << 24
AVERAGE, SQUARE = "exp_avg", "exp_avg_sq"


class UpdateSize:
    """The norm of the next update divided by that of the weights that are trained, over all ranks.

    SGD's follows from the gradient norm. Adam's is its direction's length times the learning rate; the length is
    measured every MEASURE_EVERY steps, and before the first step it is that of a first step: 1 for each element.
    Weights that ranks replicate over the tensor or pipeline axes count once for each rank. state: JSON values that a
    run saves.
    """

    def __init__(self, optimizer: object, scales: Sequence[float], eps: float, betas: Sequence[float], state: dict):
        """optimizer: DeepSpeed's ZeRO optimizer. scales: learning rate of each group, relative to the run's."""
        self.optimizer, self.scales, self.eps, self.betas = optimizer, scales, eps, betas
        self.state = state
        if not state:
            self.measure()

    def estimate(self, lr: float, grad_norm: float, clip: float) -> float | None:
        """Returns the ratio for a learning rate and a gradient norm before clipping; None if no weight is known."""
        weights = self.state["weights"]
        if not weights:
            return None
        length = self.state["direction"]
        if not _has_moments(self.optimizer):
            length = min(grad_norm, clip) if clip else grad_norm
        return lr * length / weights

    def measure_if_due(self, step: int) -> None:
        """Measures after step `step`, counted from 1, at multiples of MEASURE_EVERY. Collective."""
        if step % MEASURE_EVERY == 0:
            self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        """Measures the weights and Adam's direction. Collective."""
        totals = torch.zeros(2, dtype=torch.float64, device=device.current_device())
        for scale, flat in self._masters():
            state = self.optimizer.optimizer.state.get(flat, {})
            for start in range(0, flat.numel() if scale else 0, CHUNK):
                part = slice(start, start + CHUNK)
                vectors = flat[part].float(), self._direction(flat, state, part) * scale
                totals += torch.stack([torch.linalg.vector_norm(vector) for vector in vectors]).to(totals).square()
        dist.all_reduce(totals)
        weights, direction = totals.sqrt().tolist()
        self.state.update(weights=weights, direction=direction)

    def _direction(self, flat: Tensor, state: dict, part: slice) -> Tensor:
        """Returns Adam's direction (1-D) for a slice of a flat master; that of a first step without moments."""
        step = float(state.get("step", 0))
        if step == 0 or AVERAGE not in state:
            return torch.ones_like(flat[part], dtype=torch.float32)
        first, second = (1 - beta**step for beta in self.betas)
        scale = (state[SQUARE][part].float() / second).sqrt_().add_(self.eps)
        return state[AVERAGE][part].float() / first / scale

    def _masters(self) -> Iterator[tuple[float, Tensor]]:
        """Yields the scale of the learning rate and the 1-D master of each flat group on this rank."""
        optimizer = self.optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3
            for sub_group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                yield self.scales[optimizer.sub_group_to_group_id[sub_group]], flat
            return
        for scale, group in zip(self.scales, optimizer.optimizer.param_groups, strict=True):
            for flat in group["params"]:
                yield scale, flat


def _has_moments(optimizer: object) -> bool:
    return not isinstance(optimizer.optimizer, torch.optim.SGD)
