"""What the one module (PP = 1) and a pipeline (PP > 1) share: running a layer, gradients under sequence parallelism."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_transformer_config
from megatron_ligo.sharding import tensor_parallel

# From Python 3.12 on torch 2.13's exception that ends a second run early stays alive, and with it all that its frames
# hold: a layer's activations each, until the backward pass is over.
EARLY_STOP = sys.version_info < (3, 12)


def build_uninitialised_config(model_config: ModelConfig, build: BuildOptions) -> TransformerConfig:
    """mcore's config for layers whose weights are filled or loaded afterwards: drawing them twice takes long."""
    config = build_transformer_config(model_config, build)
    config.perform_initialization = False
    return config


def embed_tokens(words: VocabParallelEmbedding, tokens: Tensor) -> Tensor:
    """tokens (b, s) -> h (s, b, hidden), or this rank's s / tp of it under sequence parallelism.

    mcore's own embedding module would ask for CUDA's random state here, for a dropout that we do not have.
    """
    h = words(tokens)
    return h if words.reduce_scatter_embeddings else h.transpose(0, 1).contiguous()


def add_positions(h: Tensor, table: nn.Embedding, tp_rank: int, start: int = 0) -> Tensor:
    """h (s, b, hidden) with the rows of its tokens' positions added; tp_rank: whose tokens these are under sequence
    parallelism (0 without); start: the row of a sequence's first token."""
    first = start + tp_rank * h.shape[0]
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
    """What gives this rank's columns of the logits, with a weight of its own or with the embedding's."""
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


def run_layer(block: Callable, h: Tensor, rotary: Tensor | None, recompute: bool) -> Tensor:
    """h (s, b, hidden) -> (s, b, hidden) through a layer; with recompute it keeps only its input."""

    def forward(h: Tensor) -> Tensor:
        return block(h, attention_mask=None, rotary_pos_emb=rotary)[0]

    return checkpointed(forward, h) if recompute and torch.is_grad_enabled() else forward(h)


def checkpointed(run: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """run(*tensors), keeping these alone: the backward pass runs it again."""
    # Reentrant checkpoints meet ZeRO's hooks twice.
    return checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False, early_stop=EARLY_STOP)


def reduce_norm_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums over the tensor-parallel ranks the gradients of parameters that mcore marks `sequence_parallel`.

    Each of them has one use, which sees this rank's tokens only: here a hook on the gradient is a hook on that use.
    """

    def reduce(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad

    for parameter in parameters:
        if getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(reduce)
