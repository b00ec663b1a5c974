"""The model to pretrain as one module (PP = 1): Megatron-core's GPTModel with our loss, names and recomputation."""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.single_module import SingleModule
from megatron_ligo.models.mcore.layer_calls import (
    add_positions,
    build_output_linear,
    build_uninitialised_config,
    embed_tokens,
    finish_logits,
    run_layer,
)
from megatron_ligo.models.mcore.layer_spec import (
    BuildOptions,
    build_layer_spec,
    get_final_norm_class,
)
from megatron_ligo.models.mcore.rotary import build_rotary_embedding, unscale_window_positions
from megatron_ligo.sharding import tensor_parallel


class FullGPT(SingleModule, GPTModel):
    """forward(tokens (b, s), labels (b, s), loss_mask (b, s)) -> mean loss."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False):
        learned = architectures.get(model_config.arch).has_learned_positions
        super().__init__(
            config=build_uninitialised_config(model_config, build),
            transformer_layer_spec=TransformerBlockSubmodules(
                layer_specs=[build_layer_spec(model_config, build.dtype)] * model_config.num_layers,
                layer_norm=get_final_norm_class(model_config),
            ),
            vocab_size=tensor_parallel.padded_vocab(model_config.vocab_size, mesh.tp),
            max_sequence_length=model_config.num_position_rows,
            parallel_output=True,
            share_embeddings_and_output_weights=model_config.tied,
            position_embedding_type="learned_absolute" if learned else "rope",
        )
        if learned:
            # mcore would keep all tokens on every rank up to the positions, and scatter them afterwards.
            self.embedding.word_embeddings.reduce_scatter_embeddings = build.sequence_parallel
            self.embedding.position_embeddings.weight.sequence_parallel = build.sequence_parallel
        if architectures.get(model_config.arch).has_bias(Role.HEAD, model_config):
            holds_weight = not model_config.tied
            self.output_layer = build_output_linear(model_config, build, mesh, holds_weight, bias=True)
        self.sequence_part = mesh.sequence_part(build.sequence_parallel)
        self.rotary_pos_emb = build_rotary_embedding(model_config)
        unscale_window_positions(self.decoder.layers, model_config)
        self.finish_construction(model_config, mesh, recompute)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens (b, s) -> this rank's columns of the padded vocabulary, (s, b, padded / tp)."""
        h = embed_tokens(self.embedding.word_embeddings, tokens, self.model_config)
        if self.rotary_pos_emb is None:
            start = self.model_config.first_position
            h = add_positions(h, self.embedding.position_embeddings, self.sequence_part, start)
        for number, layer in enumerate(self.decoder.layers):
            positions = None if self.rotary_pos_emb is None else self.rotary_pos_emb(tokens.shape[1], number)
            h = run_layer(layer, h, positions, self.recompute)
        h = self.decoder.final_layernorm(h)
        tied = self.shared_embedding_or_output_weight() if self.model_config.tied else None
        return finish_logits(self.output_layer(h, weight=tied)[0], self.model_config)
