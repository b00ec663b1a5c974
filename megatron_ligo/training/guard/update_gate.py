"""Decides on each update of a DeepSpeed optimizer between the gradient norm and the first changed weight.

ZeRO's optimizers leave weights, moments and step counts alone if the gradient norm is not finite. The gate looks at the
true norm and, to refuse an update, passes an infinite one on: the same path, taken by all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors, is_invalid_grad_norm
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor

from megatron_ligo.common.errors import ConfigError, Problem

# The method that computes the norm within `step`, by optimizer.
NORM_METHODS = {
    DeepSpeedZeroOptimizer: "scaled_global_norm",
    DeepSpeedZeroOptimizer_Stage3: "_get_norm_groups",
    BF16_Optimizer: "get_grads_for_norm",
}


def _is_no_claim_of_overflow(record: logging.LogRecord) -> bool:
    """DeepSpeed calls the gradients of every refused step non-finite; the guard says what is wrong."""
    return "OVERFLOW!" not in record.getMessage()


class UpdateGate:
    """Calls `refuse(norm)` before each update whose gradients are finite, at the same point on all ranks.

    optimizer: DeepSpeed's. refuse: takes the gradient norm before clipping and returns True to leave everything as it
    is; it must return the same on all ranks, and may run collectives. norm: that of the last step, None if it was not
    finite. refused: the last update was refused here. ConfigError for an optimizer without ZeRO.
    """

    def __init__(self, optimizer: object, refuse: Callable[[float], bool]):
        self.optimizer, self.refuse = optimizer, refuse
        self.norm: float | None = None
        self.refused = False
        name = next((name for kind, name in NORM_METHODS.items() if isinstance(optimizer, kind)), None)
        if name is None:
            hint = "Set parallel.zero to 1, 2 or 3."
            expected = "an optimizer of ZeRO 1, 2 or 3, whose updates the loss guard can refuse"
            raise ConfigError(Problem("DeepSpeed's optimizer", expected, type(optimizer).__name__, hint))
        self._compute = getattr(optimizer, name)
        deepspeed_logger.addFilter(_is_no_claim_of_overflow)
        replacement = {"scaled_global_norm": self._scaled_global_norm, "_get_norm_groups": self._norm_groups}
        setattr(optimizer, name, replacement.get(name, self._grads_for_norm))

    def reset(self) -> None:
        """Forgets the last step."""
        self.norm, self.refused = None, False

    def _scaled_global_norm(self, *args: object, **kwargs: object) -> Tensor:
        norm = self._compute(*args, **kwargs)
        return torch.full_like(norm, torch.inf) if self._is_refused(norm) else norm

    def _norm_groups(self) -> list[Tensor]:
        groups = self._compute()
        norm = combine_grad_norm_groups(groups)
        return [torch.full_like(norm, torch.inf)] if self._is_refused(norm) else groups

    def _grads_for_norm(self, for_clipping: bool = False) -> object:
        gradients = self._compute(for_clipping=for_clipping)
        if for_clipping:
            return gradients
        dense, experts = gradients
        norm = get_global_norm_of_tensors(dense, mpu=self.optimizer.mpu, norm_type=self.optimizer.norm_type)
        if not self._is_refused(norm):
            return gradients
        return [torch.full((1,), torch.inf, device=dense[0].device)], experts

    def _is_refused(self, norm: Tensor) -> bool:
        if is_invalid_grad_norm(norm):
            return False
        self.norm = float(norm)
        self.refused = self.refuse(self.norm)
        return self.refused
