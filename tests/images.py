"""Tiny random image classifiers of the real Hugging Face classes: ViT, DeiT. Every size another."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.arch import architectures, get
from megatron_ligo.arch.dims import Dims, tokens_of_image
from megatron_ligo.formats import hf_config
from megatron_ligo.formats.base import Reader
from megatron_ligo.packing import stored
from tests.tiny import Memory

CLASSES = [(family, name) for family in ("vit", "deit") for name in architectures()[family].model_types[family]]
# A side of 10 pixels and patches of 3: the last pixel is seen by nobody.
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


def dims_of(family: str = "vit", name: str = "", **changes) -> Dims:
    """name: the class, or that of a classifier."""
    arch = get(family)
    parts = {
        part: part in arch.model_types[family][name or next(iter(arch.model_types[family]))]
        for part in arch.parts(family)
    }
    sizes = {**SIZES, **parts, "has_distillation": family == "deit", **changes}
    positions = tokens_of_image(sizes["image_size"], sizes["patch_size"], sizes["has_distillation"])
    return Dims(arch=family, model_type=family, max_positions=positions, **sizes)


def model_of(dims: Dims, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A random model; gains and biases are no ones and zeros, so that a forgotten one shows."""
    config = hf_config.config_of(dims, {}, torch.float32)
    made = getattr(transformers, config["architectures"][0])(CONFIG_MAPPING[dims.model_type](**config)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if "norm" in path and path.endswith("weight") else 0.15 * drawn)
    return made.to(dtype)


def saved(folder: Path, dims: Dims) -> tuple[torch.nn.Module, Path]:
    """The model, and the folder into which it was saved."""
    made = model_of(dims)
    made.save_pretrained(folder)
    return made, folder


def file_names(made: torch.nn.Module) -> dict[str, str]:
    """transformers' names in its files, and those that the same tensors have in memory."""
    own = {tensor.data_ptr(): name for name, tensor in made.state_dict().items()}
    return {name: own[tensor.data_ptr()] for name, tensor in revert_weight_conversion(made, made.state_dict()).items()}


def memory_of(made: torch.nn.Module, dims: Dims) -> Memory:
    """The canonical tensors of a Hugging Face model, by the table."""
    state, names = made.state_dict(), file_names(made)
    items = stored(get(dims.arch), dims, "hf").items()
    found = {key: item.part(state[names[name]], key, dims).clone() for name, item in items for key in item.keys}
    return Memory(dims, found)


def built(source: Reader) -> torch.nn.Module:
    """transformers' model of a Reader's tensors, in their dtype."""
    made = model_of(source.dims, source.read("patch").dtype)
    names, items = file_names(made), stored(source.arch, source.dims, "hf").items()
    state = {names[name]: item.whole([source.read(key) for key in item.keys], source.dims) for name, item in items}
    made.load_state_dict(state)
    return made


def pictures(dims: Dims, batch: int = 2, seed: int = 1, side: int | None = None) -> torch.Tensor:
    shape = (batch, dims.num_channels, *(side or dims.image_size,) * 2)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
