"""Tiny random image classifiers of the real Hugging Face classes, ViT and DeiT. All sizes differ."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ligo.arch import architectures, get
from megatron_ligo.arch.model_config import ModelConfig, tokens_per_image
from tests.layer_norm_models import model_of

CLASSES = [(family, name) for family in ("vit", "deit") for name in architectures()[family].model_types[family]]
# 10 pixels per side and patches of 3: the last pixel is not read.
SIZES = {
    "num_layers": 3,
    "hidden_size": 24,
    "ffn_size": 52,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 4,
    "vocab_size": 5,
    "norm_eps": 1e-3,
    "image_size": 10,
    "patch_size": 3,
    "num_channels": 2,
    "activation": "gelu",
}


def image_config(family: str = "vit", name: str = "", **changes) -> ModelConfig:
    """Returns the sizes of a model. name: its Hugging Face class, by default the classifier."""
    arch = get(family)
    parts = {
        part: part in arch.model_types[family][name or next(iter(arch.model_types[family]))]
        for part in arch.optional_parts(family)
    }
    sizes = {**SIZES, **parts, "has_distillation": family == "deit", **changes}
    positions = tokens_per_image(sizes["image_size"], sizes["patch_size"], sizes["has_distillation"])
    return ModelConfig(arch=family, model_type=family, max_positions=positions, **sizes)


def saved(folder: Path, model_config: ModelConfig) -> tuple[torch.nn.Module, Path]:
    """Saves a random model. Returns the model and the folder."""
    model = model_of(model_config)
    model.save_pretrained(folder)
    return model, folder


def pictures(model_config: ModelConfig, batch: int = 2, seed: int = 1, side: int | None = None) -> torch.Tensor:
    """Returns random images, (batch, channels, side, side), fp32."""
    shape = (batch, model_config.num_channels, *(side or model_config.image_size,) * 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels(model_config: ModelConfig, batch: int, seed: int = 1) -> torch.Tensor:
    """Returns random labels, (batch, 1), int64."""
    return torch.randint(0, model_config.vocab_size, (batch, 1), generator=torch.Generator().manual_seed(seed))
