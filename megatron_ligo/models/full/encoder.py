"""The masked-LM encoder to pretrain as one module (PP = 1); its embedding and head also serve the pipeline.

All tokens belong to the first segment, as in packed text.
Legend: s tokens (s / tp under sequence parallelism), b batch.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.single_module import SingleModule
from megatron_ligo.models.mcore.layer_calls import (
    add_positions,
    build_output_linear,
    build_uninitialised_config,
    build_word_embedding,
    embed_tokens,
    run_layer,
)
from megatron_ligo.models.mcore.layer_spec import (
    ACTIVATIONS,
    BuildOptions,
    build_layer_spec,
    get_final_norm_class,
    get_layer_class,
)
from megatron_ligo.models.mcore.norm import Norm
from megatron_ligo.models.mcore.rotary import build_rotary_embedding, unscale_window_positions
from megatron_ligo.sharding import tensor_parallel


class EmbeddingSum(nn.Module):
    """Adds position and token-type embeddings, if any, to h (s, b, hidden), then applies LayerNorm."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.start = model_config.first_position
        self.sequence_part = mesh.sequence_part(build.sequence_parallel)
        has_table = architectures.get(model_config.arch).has_learned_positions
        self.position_embeddings = (
            build_table(model_config.num_position_rows, model_config, build) if has_table else None
        )
        self.tokentype_embeddings = (
            build_table(model_config.num_token_types, model_config, build) if model_config.num_token_types else None
        )
        self.layer_norm = Norm(
            build_uninitialised_config(model_config, build), model_config.hidden_size, model_config.norm_eps
        )

    def forward(self, h: Tensor) -> Tensor:
        if self.position_embeddings is not None:
            h = add_positions(h, self.position_embeddings, self.sequence_part, self.start)
        if self.tokentype_embeddings is not None:
            h = h + self.tokentype_embeddings(torch.zeros((), dtype=torch.long, device=h.device))
        return self.layer_norm(h)


def build_table(num_rows: int, model_config: ModelConfig, build: BuildOptions) -> nn.Embedding:
    table = nn.Embedding(num_rows, model_config.hidden_size, dtype=build.dtype)
    table.weight.sequence_parallel = build.sequence_parallel
    return table


class EncoderEmbedding(EmbeddingSum):
    """tokens (b, s) -> h (s, b, hidden), the first layer's input."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__(model_config, build, mesh)
        self.model_config = model_config
        self.word_embeddings = build_word_embedding(model_config, build, mesh)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(embed_tokens(self.word_embeddings, tokens, self.model_config))


class HeadTransform(nn.Module):
    """The transform of the masked-LM head, (s, b, hidden) -> (s, b, hidden): linear, activation and norm.

    It is replicated over TP. An untied head has a second bias that the forward pass does not use; it stays unchanged.
    """

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        arch, size = architectures.get(model_config.arch), model_config.hidden_size
        self.activation = ACTIVATIONS[arch.head_activation or model_config.activation]
        has_bias = arch.has_bias(Role.HEAD_TRANSFORM, model_config)
        self.dense = nn.Linear(size, size, bias=has_bias, dtype=build.dtype)
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = build.sequence_parallel
        self.layer_norm = Norm(
            build_uninitialised_config(model_config, build), model_config.hidden_size, model_config.norm_eps
        )
        self.bias = None
        if any(param.unread and param.is_stored(model_config) for param in arch.params):
            columns = tensor_parallel.padded_vocab(model_config.vocab_size, mesh.tp) // mesh.tp
            self.bias = nn.Parameter(torch.zeros(columns, dtype=build.dtype))

    def forward(self, h: Tensor) -> Tensor:
        out = self.layer_norm(self.activation(self.dense(h)))
        # ZeRO 2 requires a gradient for every parameter.
        return out if self.bias is None else out + 0.0 * self.bias.sum()


class Encoder(nn.Module):
    """The layers and the final norm, if there is one, (s, b, hidden) -> (s, b, hidden), with Megatron-core's names."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions):
        super().__init__()
        config, layer_class = build_uninitialised_config(model_config, build), get_layer_class(model_config)
        specs = [build_layer_spec(model_config, build.dtype, layer) for layer in range(model_config.num_layers)]
        self.layers = nn.ModuleList(
            layer_class(config, spec.submodules, layer_number=i + 1) for i, spec in enumerate(specs)
        )
        self.rotary_pos_emb = build_rotary_embedding(model_config)
        unscale_window_positions(self.layers, model_config)
        self.tokens_per_row = build.tp if build.sequence_parallel else 1
        self.final_layernorm = None
        if architectures.get(model_config.arch).has(Role.FINAL_NORM):
            sizes = {"hidden_size": model_config.hidden_size, "eps": model_config.norm_eps}
            self.final_layernorm = build_module(get_final_norm_class(model_config), config=config, **sizes)

    def forward(self, h: Tensor, recompute: bool) -> Tensor:
        for number, layer in enumerate(self.layers):
            positions = None
            if self.rotary_pos_emb is not None:
                positions = self.rotary_pos_emb(h.shape[0] * self.tokens_per_row, number)
            h = run_layer(layer, h, positions, recompute)
        return h if self.final_layernorm is None else self.final_layernorm(h)


class FullEncoder(SingleModule):
    """forward(tokens (b, s), labels (b, s), loss_mask (b, s)) -> mean loss."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False):
        super().__init__()
        self.embedding = EncoderEmbedding(model_config, build, mesh)
        self.encoder = Encoder(model_config, build)
        self.lm_head = HeadTransform(model_config, build, mesh)
        has_bias = architectures.get(model_config.arch).has_bias(Role.HEAD, model_config)
        self.output_layer = build_output_linear(
            model_config, build, mesh, holds_weight=not model_config.tied, bias=has_bias
        )
        self.finish_construction(model_config, mesh, recompute)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) -> this rank's columns of the padded vocabulary, (s, b, padded / tp)."""
        h = self.lm_head(self.encoder(self.embedding(tokens), self.recompute))
        tied = self.embedding.word_embeddings.weight if self.model_config.tied else None
        return self.output_layer(h, weight=tied)[0]
