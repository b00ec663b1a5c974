"""The language-model loss over a vocabulary cut over the tensor-parallel ranks. Fit and pretraining share it."""

from __future__ import annotations

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def language_model_loss(logits: Tensor, labels: Tensor, mask: Tensor, vocab_size: int, tp_rank: int) -> Tensor:
    """Mean cross entropy over the tokens whose mask is 1.

    logits: (s, b, padded vocabulary / tp), this rank's columns. labels, mask: (b, s). Columns that only pad the
    vocabulary are shut out, so that the loss does not depend on tp.
    """
    columns = logits.shape[-1]
    padding = (tp_rank + 1) * columns - vocab_size
    logits = logits.float()
    if padding > 0:
        keep = max(columns - padding, 0)
        logits = logits.clone()
        logits[..., keep:] = float("-inf")
    per_token = vocab_parallel_cross_entropy(logits.contiguous(), labels.t().contiguous())
    weights = mask.t().to(per_token.dtype)
    return (per_token * weights).sum() / weights.sum()
