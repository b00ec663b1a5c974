"""The model to pretrain as a pipeline (PP > 1): DeepSpeed's PipelineModule over Megatron-core's modules.

Its parameters have the same names as those of the single modules (gpt.py, ...), so one checkpoint fits both.
Legend: s tokens (s / tp under sequence parallelism), b batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.mcore_names import to_local_name
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.common import library_log
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.encoder import EmbeddingSum, HeadTransform
from megatron_ligo.models.full.image_classifier import ClassHead, ImageEmbedding
from megatron_ligo.models.full.single_module import finish_model
from megatron_ligo.models.loss import LossMixin
from megatron_ligo.models.mcore.layer_calls import (
    add_positions,
    build_output_linear,
    build_uninitialised_config,
    build_word_embedding,
    embed_tokens,
    finish_logits,
    run_layer,
)
from megatron_ligo.models.mcore.layer_spec import (
    BuildOptions,
    build_layer_spec,
    get_final_norm_class,
    get_layer_class,
)
from megatron_ligo.models.mcore.rotary import build_rotary_embedding, unscale_window_positions
from megatron_ligo.sharding import pipeline_layers, tensor_parallel

TIED = "embedding"
TIED_WEIGHT = "word_embeddings.weight"


class PipelineEmbedding(nn.Module):
    """tokens (b, s) -> h (s, b, hidden). If embeddings are tied, the last stage has a copy as the head's weight."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.model_config = model_config
        self.word_embeddings = build_word_embedding(model_config, build, mesh)
        if model_config.tied:
            self.head = build_output_linear(model_config, build, mesh, holds_weight=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return embed_tokens(self.word_embeddings, tokens, self.model_config)

    def logits(self, h: Tensor) -> Tensor:
        """h (s, b, hidden) -> this rank's columns of the logits (s, b, padded vocabulary / tp)."""
        return finish_logits(self.head(h, weight=self.word_embeddings.weight)[0], self.model_config)


class PositionEmbedding(nn.Module):
    """Adds learned position embeddings to h (s, b, hidden)."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        num_rows = model_config.num_position_rows
        self.position_embeddings = nn.Embedding(num_rows, model_config.hidden_size, dtype=build.dtype)
        self.position_embeddings.weight.sequence_parallel = build.sequence_parallel
        self.sequence_part = mesh.sequence_part(build.sequence_parallel)
        self.start = model_config.first_position

    def forward(self, h: Tensor) -> Tensor:
        return add_positions(h, self.position_embeddings, self.sequence_part, self.start)


class PipelineLayer:
    """A layer with its own rotary embedding, (s, b, hidden) -> (s, b, hidden)."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, layer: int, recompute: bool):
        config = build_uninitialised_config(model_config, build)
        submodules = build_layer_spec(model_config, build.dtype, layer).submodules
        super().__init__(config, submodules, layer_number=layer + 1)
        self.rotary_pos_emb = build_rotary_embedding(model_config)
        unscale_window_positions([self], model_config)
        self.recompute = recompute
        self.tokens_per_row = build.tp if build.sequence_parallel else 1

    def forward(self, h: Tensor) -> Tensor:
        positions = None
        if self.rotary_pos_emb is not None:
            positions = self.rotary_pos_emb(h.shape[0] * self.tokens_per_row, self.layer_number - 1)
        return run_layer(super().forward, h, positions, self.recompute)


@cache
def get_pipeline_layer_class(layer: type[TransformerLayer]) -> type:
    """Returns the pipeline layer class of a layer class."""
    return type(f"Stage{layer.__name__}", (PipelineLayer, layer), {})


class FinalNorm(nn.Module):
    """The norm after the last layer, (s, b, hidden) -> (s, b, hidden)."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions):
        super().__init__()
        config = build_uninitialised_config(model_config, build)
        self.norm = build_module(
            get_final_norm_class(model_config),
            config=config,
            hidden_size=model_config.hidden_size,
            eps=model_config.norm_eps,
        )

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(h)


class OutputHead(nn.Module):
    """Untied head: h (s, b, hidden) -> this rank's columns of the logits (s, b, padded vocabulary / tp)."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.model_config = model_config
        self.linear = build_output_linear(model_config, build, mesh, holds_weight=True)

    def forward(self, h: Tensor) -> Tensor:
        return finish_logits(self.linear(h)[0], self.model_config)


class OutputBias(nn.Module):
    """Adds a tied head's bias to the logits (s, b, padded vocabulary / tp)."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        columns = tensor_parallel.padded_vocab(model_config.vocab_size, mesh.tp) // mesh.tp
        self.bias = nn.Parameter(torch.zeros(columns, dtype=build.dtype))

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias


class FullPipeline(LossMixin, PipelineModule):
    """tokens (b, s) or images -> logits on the last stage. Its loss takes (labels, loss_mask). The weights must be
    filled or loaded first.

    Its layers are those of sharding/pipeline_layers.py.
    """

    first_expert = 0

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False):
        self.model_config = model_config
        self.mesh = mesh
        self.prefixes = build_name_prefixes(model_config)
        specs = build_layer_specs(model_config, build, mesh, recompute)
        with library_log.log_prints("deepspeed"):
            topology = PipeModelDataParallelTopology(num_pp=mesh.pp, num_mp=mesh.tp * mesh.ep, num_dp=mesh.expert_dp)
            super().__init__(specs, topology=topology, loss_fn=self._loss)
        finish_model(self, model_config, mesh)

    def _partition_layers(self, method: str = "explicit") -> None:
        cuts = pipeline_layers.stage_bounds(self.model_config.num_layers, self.mesh.pp)
        before = pipeline_layers.num_layers_before(self.model_config)
        self.parts = [0, *(before + cut for cut in cuts[1:-1]), len(self._layer_specs)]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        # DeepSpeed broadcasts the parameter itself; recorded by autograd, that would warn in each backward pass.
        super()._synchronize_tied_weights()

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self._canonical(name), parameter

    def _canonical(self, name: str) -> str:
        """Returns a parameter's name in the single module: `3.mlp.linear_fc1.weight` -> `decoder.layers.2.mlp...`."""
        for own, canonical in self.prefixes.items():
            if name.startswith(own):
                return to_local_name(canonical + name.removeprefix(own), self.first_expert)
        raise AssertionError(f"{name} is in no layer of the pipeline")

    def _loss(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        return self.measure(logits, *labels)


def build_layer_specs(model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool) -> list[LayerSpec]:
    arch = architectures.get(model_config.arch)
    layer = get_pipeline_layer_class(get_layer_class(model_config))
    layers = [LayerSpec(layer, model_config, build, number, recompute) for number in range(model_config.num_layers)]
    if arch.reads_images:
        ends = [LayerSpec(FinalNorm, model_config, build), LayerSpec(ClassHead, model_config, build, mesh)]
        return [LayerSpec(ImageEmbedding, model_config, build, mesh), *layers, *ends]
    if arch.is_masked_lm:
        layers = [LayerSpec(EmbeddingSum, model_config, build, mesh), *layers]
    elif arch.has_learned_positions:
        layers = [LayerSpec(PositionEmbedding, model_config, build, mesh), *layers]
    if arch.has(Role.FINAL_NORM):
        layers.append(LayerSpec(FinalNorm, model_config, build))
    if arch.is_masked_lm:
        layers.append(LayerSpec(HeadTransform, model_config, build, mesh))
    bias = [LayerSpec(OutputBias, model_config, build, mesh)] if arch.has_bias(Role.HEAD, model_config) else []
    if not model_config.tied:
        return [
            LayerSpec(PipelineEmbedding, model_config, build, mesh),
            *layers,
            LayerSpec(OutputHead, model_config, build, mesh),
            *bias,
        ]
    first = TiedLayerSpec(TIED, PipelineEmbedding, model_config, build, mesh, tied_weight_attr=[TIED_WEIGHT])
    last = TiedLayerSpec(
        TIED,
        PipelineEmbedding,
        model_config,
        build,
        mesh,
        forward_fn=PipelineEmbedding.logits,
        tied_weight_attr=[TIED_WEIGHT],
    )
    return [first, *layers, last, *bias]


def build_name_prefixes(model_config: ModelConfig) -> dict[str, str]:
    """Maps the prefix of each pipeline layer's parameter names to that in the single module."""
    names = [
        (layer, own, whole)
        for layer, held in enumerate(pipeline_layers.layer_prefixes(model_config))
        for own, whole in held.items()
    ]
    return {f"tied_modules.{TIED}.": "embedding."} | {f"{layer}.{own}": whole for layer, own, whole in names}
