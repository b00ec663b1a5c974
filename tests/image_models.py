"""Tiny random image classifiers of the real Hugging Face classes: ViT, DeiT and DINOv2. All sizes differ."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_ligo.arch import architectures, get
from megatron_ligo.arch.model_config import ModelConfig, positions_per_image
from tests.layer_norm_models import model_of

# Name of a case: the family, and the fields of ModelConfig in which it differs.
OWN = {
    "vit": ("vit", {}),
    "deit": ("deit", {"has_distillation": True}),
    "dinov2": ("dinov2", {"ffn_size": 48, "qkv_bias": True, "has_mask_token": True}),
    "dinov2 with a gate": ("dinov2", {"ffn_size": 32, "has_gate": True, "activation": "silu"}),
    "dinov2_with_registers": ("dinov2_with_registers", {"ffn_size": 72, "qkv_bias": True, "num_registers": 3}),
}
CLASSES = [(case, name) for case, (family, _) in OWN.items() for name in architectures()[family].model_types[family]]
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


def image_config(case: str = "vit", name: str = "", **changes) -> ModelConfig:
    """Returns the sizes of a model. name: its Hugging Face class, by default the classifier."""
    family, own = OWN[case]
    arch = get(family)
    parts = {
        part: part in arch.model_types[family][name or next(iter(arch.model_types[family]))]
        for part in arch.optional_parts(family)
    }
    sizes = {**SIZES, **parts, **own, **changes}
    positions = positions_per_image(sizes["image_size"], sizes["patch_size"], case == "deit")
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
