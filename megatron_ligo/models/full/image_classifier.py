"""The image classifier to pretrain as one module (PP = 1); its embedding and head also serve the pipeline.

Legend: s tokens of an image (special tokens first, then patches), b batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.encoder import Encoder
from megatron_ligo.models.full.single_module import SingleModule
from megatron_ligo.models.mcore.layer_calls import build_output_linear, build_uninitialised_config
from megatron_ligo.models.mcore.layer_spec import BuildOptions, get_final_norm_class


def embed_image(
    images: Tensor, weight: Tensor, bias: Tensor | None, special: Sequence[Tensor | None], positions: Tensor
) -> Tensor:
    """Embeds images (b, channels, side, side) -> (s, b, features): special tokens and patches, plus positions.

    weight: (features, channels, patch, patch); special: (features,) each, or None; positions: (s, features).
    """
    patches = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(2).permute(2, 0, 1)
    special_tokens = [token.expand(1, patches.shape[1], -1) for token in special if token is not None]
    return torch.cat([*special_tokens, patches]) + positions[:, None]


class ImageEmbedding(nn.Module):
    """images (b, channels, side, side) -> h (s, b, hidden), or this rank's s / tp under sequence parallelism."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.ranks, self.rank = (mesh.tp, mesh.tp_rank) if build.sequence_parallel else (1, 0)
        size, patch = model_config.hidden_size, model_config.patch_size
        self.patch_embeddings = nn.Conv2d(model_config.num_channels, size, patch, stride=patch, dtype=build.dtype)
        self.class_token = nn.Parameter(torch.zeros(size, dtype=build.dtype))
        self.distillation_token = (
            nn.Parameter(torch.zeros(size, dtype=build.dtype)) if model_config.has_distillation else None
        )
        self.position_embeddings = nn.Embedding(model_config.max_positions, size, dtype=build.dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = build.sequence_parallel

    def forward(self, images: Tensor) -> Tensor:
        patch, special = self.patch_embeddings, (self.class_token, self.distillation_token)
        h = embed_image(images, patch.weight, patch.bias, special, self.position_embeddings.weight)
        return h.chunk(self.ranks)[self.rank].contiguous()


def classify_first_token(head: ColumnParallelLinear, h: Tensor) -> Tensor:
    """h (s or s / tp, b, hidden) -> this rank's columns of the class token's logits, (1, b, padded labels / tp)."""
    # Under sequence parallelism only one rank has the token, and the linear gathers all tokens.
    return head(h if head.sequence_parallel else h[:1])[0][:1]


class ClassHead(nn.Module):
    """`classify_first_token` as a pipeline layer: (s, b, hidden) -> this rank's logits."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.linear = build_output_linear(model_config, build, mesh, holds_weight=True, bias=True)

    def forward(self, h: Tensor) -> Tensor:
        return classify_first_token(self.linear, h)


class Decoder(Encoder):
    """The layers and the final norm, (s, b, hidden) -> (s, b, hidden), with the names of Megatron-core's decoder."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions):
        super().__init__(model_config, build)
        config = build_uninitialised_config(model_config, build)
        self.final_layernorm = build_module(
            get_final_norm_class(), config=config, hidden_size=model_config.hidden_size, eps=model_config.norm_eps
        )

    def forward(self, h: Tensor, recompute: bool) -> Tensor:
        return self.final_layernorm(super().forward(h, recompute))


class FullImageClassifier(SingleModule):
    """forward(images (b, channels, side, side), labels (b, 1), loss_mask (b, 1)) -> mean loss."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False):
        super().__init__()
        self.embedding = ImageEmbedding(model_config, build, mesh)
        self.decoder = Decoder(model_config, build)
        self.output_layer = build_output_linear(model_config, build, mesh, holds_weight=True, bias=True)
        self.finish_construction(model_config, mesh, recompute)

    def logits(self, images: Tensor) -> Tensor:
        """images (b, channels, side, side) -> this rank's columns of the logits, (1, b, padded labels / tp)."""
        return classify_first_token(self.output_layer, self.decoder(self.embedding(images), self.recompute))
