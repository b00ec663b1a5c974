"""Tensors that are built once per optimizer step and shared by its micro-batches."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class _SumGradient(torch.autograd.Function):
    """Identity for all micro-batches but the last. Gradients are accumulated in fp32 and stop here."""

    @staticmethod
    def forward(ctx, leaf: Tensor, sums: list[Tensor | None], index: int) -> Tensor:
        ctx.sums, ctx.index = sums, index
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx, grad: Tensor):
        total = ctx.sums[ctx.index]
        ctx.sums[ctx.index] = grad.to(torch.float32, copy=True) if total is None else total.add_(grad)
        return None, None, None


class _ReleaseGradient(torch.autograd.Function):
    """Identity for the last micro-batch. Passes its gradient plus the accumulated sum on into the graph."""

    @staticmethod
    def forward(ctx, value: Tensor, sums: list[Tensor | None], index: int) -> Tensor:
        ctx.sums, ctx.index = sums, index
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad: Tensor):
        total, ctx.sums[ctx.index] = ctx.sums[ctx.index], None
        return grad if total is None else total.add_(grad).to(grad.dtype), None, None


class StepCache:
    """A step's tensors. Their graph is traversed once, in the last micro-batch's backward pass.

    A cache is valid for one version (`StepState.version`), which changes with every optimizer step and every other
    input of the tensors. No cache is valid for version None.
    """

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.calls = 0
        self.version: Hashable = None

    def needs_rebuild(self, version: Hashable) -> bool:
        return version is None or self.version != version

    def mark_built(self, version: Hashable, values: list[Tensor]) -> None:
        """Stores the tensors (of any shapes) that were built for a version."""
        self.version = version
        self.values = values
        self.leaves = [value.detach().requires_grad_() for value in values]
        self.sums: list[Tensor | None] = [None] * len(values)
        self.calls = 0

    def take(self, micro_batches: int) -> list[Tensor]:
        """Returns this micro-batch's views of the values. Those of the last one are connected to the graph."""
        if not torch.is_grad_enabled():
            return self.values
        self.calls += 1
        assert self.calls <= micro_batches, "a step has more micro-batches than its context states"
        if self.calls < micro_batches:
            return [_SumGradient.apply(leaf, self.sums, i) for i, leaf in enumerate(self.leaves)]
        joined = [_ReleaseGradient.apply(value, self.sums, i) for i, value in enumerate(self.values)]
        self.values, self.leaves = [], []
        return joined
