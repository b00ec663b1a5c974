"""Loss and accuracy over a vocabulary (tokens, or an image's labels) that is sharded over the TP ranks.

Shared by fit and pretraining. Legend: s tokens, b batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh


class _SumParts(torch.autograd.Function):
    """Sums what the context-parallel ranks have of a loss.

    DeepSpeed averages gradients over all replicas, but those of parts of one sequence add up.
    """

    @staticmethod
    def forward(ctx, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.ranks = dist.get_world_size(group)
        part = part.clone()
        dist.all_reduce(part, group=group)
        return part

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.ranks, None


def mean_over_tokens(values: Tensor, weights: Tensor, mesh: Mesh, by_sample: bool = False) -> Tensor:
    """Returns the weighted mean, a scalar, of the values of all tokens of a micro-batch: on each context-parallel rank
    that of the whole sequences. values, weights: (s, b). by_sample: returns the mean of each sequence, (b,)."""
    values = values * weights
    total, weight = (values.sum(0), weights.sum(0)) if by_sample else (values.sum(), weights.sum())
    if mesh.cp > 1:
        weight = weight.clone()
        dist.all_reduce(weight, group=mesh.cp_group)
        total = _SumParts.apply(total, mesh.cp_group)
    return total / weight


def compute_loss(
    logits: Tensor, labels: Tensor, mask: Tensor, vocab_size: int, mesh: Mesh, by_sample: bool = False
) -> Tensor:
    """Returns the mean cross entropy (a scalar, fp32) over the tokens whose mask is 1.

    logits: (s, b, padded vocabulary / tp), this rank's columns. labels (int64), mask: (b, s). Columns that pad the
    vocabulary are masked, so the loss does not depend on tp. by_sample: returns the mean of each sequence, (b,).
    """
    columns = logits.shape[-1]
    padding = (mesh.tp_rank + 1) * columns - vocab_size
    logits = logits.float()
    if padding > 0:
        keep = max(columns - padding, 0)
        logits = logits.clone()
        logits[..., keep:] = float("-inf")
    per_token = vocab_parallel_cross_entropy(logits.contiguous(), labels.t().contiguous())
    return mean_over_tokens(per_token, mask.t().to(per_token.dtype), mesh, by_sample)


def compute_accuracy(logits: Tensor, labels: Tensor, mask: Tensor, vocab_size: int, mesh: Mesh) -> Tensor:
    """Returns the fraction (a scalar, fp32) of the labels with mask 1 that have the largest logit; ties go to the
    first column.

    logits: (s, b, padded vocabulary / tp), this rank's columns. labels (int64), mask: (b, s).
    """
    first = mesh.tp_rank * logits.shape[-1]
    own = logits.float()[..., : max(1, vocab_size - first)]
    best, column = own.max(dim=-1)
    if first >= vocab_size:
        best = torch.full_like(best, -torch.inf)
    best_by_rank = [torch.empty_like(best) for _ in range(mesh.tp)]
    dist.all_gather(best_by_rank, best.contiguous(), group=mesh.tp_group)
    column_by_rank = [torch.empty_like(column) for _ in range(mesh.tp)]
    dist.all_gather(column_by_rank, (column + first).contiguous(), group=mesh.tp_group)
    winner = torch.stack(best_by_rank).max(dim=0).indices
    predicted = torch.stack(column_by_rank).gather(0, winner[None])[0]
    weights = mask.t().to(logits.device, torch.float32)
    return ((predicted == labels.t()) * weights).sum() / weights.sum()


class LossMixin:
    """Computes a model's loss, or its accuracy within `measuring_accuracy`, its loss on each sequence within
    `measuring_samples`."""

    model_config: ModelConfig
    mesh: Mesh
    measures_accuracy = False
    measures_samples = False

    def measure(self, logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """Returns the loss or accuracy, a scalar, of logits (s, b, padded vocabulary / tp), labels and mask (b, s);
        within `measuring_samples`, the loss on each sequence, (b,)."""
        if self.measures_accuracy:
            return compute_accuracy(logits, labels, mask, self.model_config.vocab_size, self.mesh)
        return compute_loss(logits, labels, mask, self.model_config.vocab_size, self.mesh, self.measures_samples)

    @contextmanager
    def measuring_accuracy(self) -> Iterator[None]:
        self.measures_accuracy = True
        try:
            yield
        finally:
            self.measures_accuracy = False

    @contextmanager
    def measuring_samples(self) -> Iterator[None]:
        self.measures_samples = True
        try:
            yield
        finally:
            self.measures_samples = False
