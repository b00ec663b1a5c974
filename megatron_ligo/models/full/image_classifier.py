"""The image classifier to pretrain as one module (PP = 1); its embedding and head also serve the pipeline.

Legend: s tokens of an image (special tokens first, then patches), b batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.distributed.mesh import Mesh
from megatron_ligo.models.full.encoder import Encoder
from megatron_ligo.models.full.single_module import SingleModule
from megatron_ligo.models.mcore.layer_calls import build_output_linear
from megatron_ligo.models.mcore.layer_spec import BuildOptions


def embed_image(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    special: Sequence[Tensor | None],
    positions: Tensor,
    registers: Tensor | None = None,
) -> Tensor:
    """Embeds images (b, channels, side, side) -> (s, b, features): special tokens and patches, plus positions.

    weight: (features, channels, patch, patch); special: (features,) each, or None; positions: (s - r, features);
    registers: (r, features), tokens without positions after the first one, or None.
    """
    patches = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(2).permute(2, 0, 1)
    special_tokens = [token.expand(1, patches.shape[1], -1) for token in special if token is not None]
    h = torch.cat([*special_tokens, patches]) + positions[:, None]
    if registers is None:
        return h
    return torch.cat([h[:1], registers[:, None].expand(-1, h.shape[1], -1), h[1:]])


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
        self.register_tokens = self.mask_token = None
        if model_config.num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(model_config.num_registers, size, dtype=build.dtype))
        if stores_mask_token(model_config):
            self.mask_token = nn.Parameter(torch.zeros(size, dtype=build.dtype))
        self.position_embeddings = nn.Embedding(model_config.max_positions, size, dtype=build.dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = build.sequence_parallel

    def forward(self, images: Tensor) -> Tensor:
        patch, special = self.patch_embeddings, (self.class_token, self.distillation_token)
        positions = self.position_embeddings.weight
        h = embed_image(images, patch.weight, patch.bias, special, positions, self.register_tokens)
        if self.mask_token is not None:
            # No patch is masked, but ZeRO 2 requires a gradient for every parameter.
            h = h + 0.0 * self.mask_token.sum()
        return h.chunk(self.ranks)[self.rank].contiguous()


def stores_mask_token(model_config: ModelConfig) -> bool:
    param = next((p for p in architectures.get(model_config.arch).params if p.role is Role.MASK_TOKEN), None)
    return param is not None and param.exists(model_config)


def classify(head: ColumnParallelLinear, patch_head: ColumnParallelLinear | None, h: Tensor, first: int) -> Tensor:
    """h (s or s / tp, b, hidden) -> this rank's columns of the logits, (1, b, padded labels / tp).

    They are the head's of the class token, plus the patch head's, if any, of the mean of the patches from `first` on.
    """
    # Under sequence parallelism each rank has a part of the tokens, and the linears gather all of them.
    if head.sequence_parallel:
        logits = head(h)[0][:1]
        return logits if patch_head is None else logits + patch_head(h)[0][first:].mean(dim=0, keepdim=True)
    logits = head(h[:1])[0]
    return logits if patch_head is None else logits + patch_head(h[first:].mean(dim=0, keepdim=True))[0]


def build_patch_head(model_config: ModelConfig, build: BuildOptions, mesh: Mesh) -> ColumnParallelLinear | None:
    """Builds the head that reads the mean of the patches; None if the family has none."""
    if not architectures.get(model_config.arch).has(Role.PATCH_HEAD):
        return None
    return build_output_linear(model_config, build, mesh, holds_weight=True)


class ClassHead(nn.Module):
    """`classify` as a pipeline layer: (s, b, hidden) -> this rank's logits."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh):
        super().__init__()
        self.linear = build_output_linear(model_config, build, mesh, holds_weight=True, bias=True)
        self.patch_linear = build_patch_head(model_config, build, mesh)
        self.first_patch = model_config.num_special_tokens

    def forward(self, h: Tensor) -> Tensor:
        return classify(self.linear, self.patch_linear, h, self.first_patch)


class FullImageClassifier(SingleModule):
    """forward(images (b, channels, side, side), labels (b, 1), loss_mask (b, 1)) -> mean loss."""

    def __init__(self, model_config: ModelConfig, build: BuildOptions, mesh: Mesh, recompute: bool = False):
        super().__init__()
        self.embedding = ImageEmbedding(model_config, build, mesh)
        self.decoder = Encoder(model_config, build)
        self.output_layer = build_output_linear(model_config, build, mesh, holds_weight=True, bias=True)
        self.patch_output_layer = build_patch_head(model_config, build, mesh)
        self.finish_construction(model_config, mesh, recompute)

    def logits(self, images: Tensor) -> Tensor:
        """images (b, channels, side, side) -> this rank's columns of the logits, (1, b, padded labels / tp)."""
        h = self.decoder(self.embedding(images), self.recompute)
        return classify(self.output_layer, self.patch_output_layer, h, self.model_config.num_special_tokens)
