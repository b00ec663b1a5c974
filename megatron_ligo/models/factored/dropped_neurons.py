"""Neurons of experts that start from random weights (drop-upcycling), as a fit computes them.

They are fixed and have the large model's width: a fit learns maps, and no map reaches them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ligo.arch.spec import ParamSpec, Role
from megatron_ligo.distributed import device
from megatron_ligo.growth.operator import Operator


@dataclass
class DroppedNeurons:
    """Those of one expert among a rank's n neurons, m of them.

    kept: (n,), 0 for them and 1 for the others. fused: (2 m, D2), gate and up. down: (D2, m). In fp32, in which a fit
    is evaluated.
    """

    kept: Tensor
    fused: Tensor
    down: Tensor

    @classmethod
    def draw(
        cls, operator: Operator, specs: dict[Role, ParamSpec], layer: int, expert: int, neurons: range
    ) -> DroppedNeurons:
        """Draws the weights of a large layer's expert. neurons: those of this rank, by their numbers in the expert."""
        roles = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
        keys = [specs[role].key.format(layer, expert) for role in roles]
        chosen = operator.dropped_neurons(keys[0])
        chosen = chosen[(chosen >= neurons.start) & (chosen < neurons.stop)]
        kept = torch.ones(len(neurons))
        kept[chosen - neurons.start] = 0
        gate, up, down = map(operator.draw_expert, keys)
        tensors = (kept, torch.cat([gate[chosen], up[chosen]]), down[:, chosen])
        return cls(*(tensor.to(device.current_device()) for tensor in tensors))

    def run(self, x: Tensor, chances: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns what they add to the expert's outputs: x (n, D2), chances (n,) -> (n, D2)."""
        hidden = activation(F.linear(x, self.fused.to(x)))
        return F.linear((hidden * chances[:, None]).to(x), self.down.to(x))
