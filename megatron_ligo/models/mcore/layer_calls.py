"""Construction and calls of Megatron-core's modules, shared by single modules (PP = 1) and pipelines (PP > 1).

Legend: s tokens, b batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError, checkpoint

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_transformer_config
from megatron_ligo.sharding import tensor_parallel


def build_uninitialised_config(model_config: ModelConfig, build: BuildOptions) -> TransformerConfig:
    """Builds mcore's config without weight initialisation, which is slow: weights are filled or loaded afterwards."""
    config = build_transformer_config(model_config, build)
    config.perform_initialization = False
    return config


def embed_tokens(words: VocabParallelEmbedding, tokens: Tensor, model_config: ModelConfig) -> Tensor:
    """tokens (b, s) -> h (s, b, hidden), or (s / tp, b, hidden) under sequence parallelism.

    mcore's own embedding module would access the CUDA random state for its dropout, which is 0 here.
    """
    h = words(tokens)
    h = h if words.reduce_scatter_embeddings else h.transpose(0, 1).contiguous()
    multiplier = architectures.get(model_config.arch).embedding_multiplier(model_config)
    return h if multiplier == 1 else h * multiplier


def finish_logits(logits: Tensor, model_config: ModelConfig) -> Tensor:
    """Returns what the network's loss reads, from the head's product (..., columns), of the same shape."""
    if model_config.logits_multiplier != 1:
        logits = logits * model_config.logits_multiplier
    if model_config.logits_divisor != 1:
        logits = logits / model_config.logits_divisor
    softcap = model_config.logits_softcap
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def add_positions(h: Tensor, table: nn.Embedding, part: int, start: int = 0) -> Tensor:
    """Adds the position embeddings to h (s or s / tp, b, hidden).

    part: which of the equal parts of the sequences h is. start: the table's row for the first token of a sequence.
    """
    first = start + part * h.shape[0]
    return h + table(torch.arange(first, first + h.shape[0], device=h.device))[:, None]


def build_word_embedding(model_config: ModelConfig, build: BuildOptions, mesh: Mesh) -> VocabParallelEmbedding:
    config = build_uninitialised_config(model_config, build)
    return VocabParallelEmbedding(
        tensor_parallel.padded_vocab(model_config.vocab_size, mesh.tp),
        model_config.hidden_size,
        init_method=config.init_method,
        reduce_scatter_embeddings=build.sequence_parallel,
        config=config,
        tp_group=mesh.tp_group,
    )


def build_output_linear(
    model_config: ModelConfig, build: BuildOptions, mesh: Mesh, holds_weight: bool, bias: bool = False
) -> ColumnParallelLinear:
    """Builds the linear from h to this rank's columns of the logits. Without its own weight it is called with the
    embedding's."""
    config = build_uninitialised_config(model_config, build)
    return ColumnParallelLinear(
        model_config.hidden_size,
        tensor_parallel.padded_vocab(model_config.vocab_size, mesh.tp),
        config=config,
        init_method=config.init_method,
        bias=bias,
        gather_output=False,
        skip_weight_param_allocation=not holds_weight,
        tp_group=mesh.tp_group,
    )


def call_layer(block: Callable, h: Tensor, rotary: Tensor | None) -> Tensor:
    """Calls a layer, or its bound forward method, on h (s, b, hidden) -> (s, b, hidden)."""
    try:
        return block(h, attention_mask=None, rotary_pos_emb=rotary)[0]
    except _StopRecomputationError:
        # Megatron-core 0.19 keeps the input of the second norm, and with it the layer's graph, until forward ends.
        layer = getattr(block, "__self__", block)
        if getattr(layer, "mlp_norm_manager", None) is not None:
            layer.mlp_norm_manager = None
        raise


def run_layer(block: Callable, h: Tensor, rotary: Tensor | None, recompute: bool) -> Tensor:
    """Runs a layer on h (s, b, hidden) -> (s, b, hidden); with recompute, only h is kept for the backward pass."""

    def forward(h: Tensor) -> Tensor:
        return call_layer(block, h, rotary)

    return checkpointed(forward, h) if recompute and torch.is_grad_enabled() else forward(h)


def checkpointed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Returns run(*tensors), of any shapes. Saves only the tensors: the backward pass recomputes it.

    The recomputation stops at the last tensor that the backward pass needs: run to its end, ZeRO 3 would release the
    weights that the backward pass is about to use. Layers are called through `call_layer`.
    """
    # Reentrant checkpoints would trigger ZeRO's hooks twice.
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, early_stop=True)


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, factor: float = 1.0) -> None:
    """Registers hooks that sum the gradients of replicated parameters with partial uses over the TP ranks.

    Each parameter must have a single use, so that its gradient is that use's. factor: multiplies the sum.
    """

    def all_reduce(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad if factor == 1 else grad.mul_(factor)

    for parameter in parameters:
        parameter.register_hook(all_reduce)
