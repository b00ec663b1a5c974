"""Distillation of the small model into the grown model, on the next-token distribution.

Legend: s tokens, b batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.distributed import device
from megatron_ligo.distributed.collectives import copy_to, reduce_from
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full import parameters
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.loss import mean_over_tokens
from megatron_ligo.models.mcore.layer_spec import BuildOptions


class Teacher:
    """The frozen small model. weight: the divergence's share of the loss. Not an nn.Module: it adds no parameters."""

    def __init__(self, reader: Reader, mesh: Mesh, dtype: torch.dtype, weight: float, sequence_parallel: bool):
        self.mesh, self.weight, self.vocab_size = mesh, weight, reader.model_config.vocab_size
        self.model = build_model(reader.model_config, BuildOptions(dtype, mesh.tp, sequence_parallel), mesh)
        parameters.fill_parameters(self.model, reader.model_config, mesh, reader.read)
        self.model.to(device.current_device()).requires_grad_(False).eval()

    def kl_divergence(self, logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Returns KL(teacher || student), a scalar: its mean over the tokens whose mask is 1.

        logits: the student's, (s, b, padded vocabulary / tp). tokens, mask: (b, s).
        """
        with torch.no_grad():
            target = self.model.logits(tokens)
        per_token = compute_token_divergence(target, logits, self.mesh, self.vocab_size)
        return mean_over_tokens(per_token, mask.t().to(per_token.dtype), self.mesh)


def compute_token_divergence(target: Tensor, logits: Tensor, mesh: Mesh, vocab_size: int) -> Tensor:
    """Returns KL(softmax(target) || softmax(logits)) of each token, fp32, over a vocabulary sharded over TP.

    Both (..., padded vocabulary / tp), this rank's columns -> (...). Columns that pad the vocabulary are excluded.
    """
    columns = logits.shape[-1]
    own = max(0, min(columns, vocab_size - mesh.tp_rank * columns))
    target, logits = target[..., :own].float(), logits[..., :own].float()
    teacher_log_probs = target - log_sum_exp(target, mesh)[..., None]
    # Each rank uses the sum for its own columns only: a partial use.
    log_probs = logits - copy_to(log_sum_exp(logits, mesh), mesh.tp_group)[..., None]
    divergence = (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(dim=-1)
    return reduce_from(divergence, mesh.tp_group)


def log_sum_exp(logits: Tensor, mesh: Mesh) -> Tensor:
    """Returns the log-sum-exp of logits (..., columns) over the columns of all TP ranks, (...)."""
    lowest = torch.full_like(logits[..., :1], -torch.inf)
    top = torch.cat([logits.detach(), lowest], dim=-1).max(dim=-1).values
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=mesh.tp_group)
    return reduce_from((logits - top[..., None]).exp().sum(dim=-1), mesh.tp_group).log() + top
