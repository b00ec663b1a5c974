"""Writes tiny GGUF files of the networks that the program reads, with any metadata."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGUFValueType as Type

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.sharding.fused_tensors import stored_tensors

FAMILIES = ("llama", "qwen2")
VOCAB, LAYERS = 300, 2
SIZES = {
    "block_count": LAYERS, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e4, "vocab_size": VOCAB,
}  # fmt: skip
REMOVED = object()


def model_config(family: str) -> ModelConfig:
    """Returns the sizes that `SIZES` states."""
    return ModelConfig(
        arch="llama", model_type=family, num_layers=LAYERS, hidden_size=32, ffn_size=48, num_heads=4, num_kv_heads=2,
        head_dim=8, vocab_size=VOCAB, max_positions=64, norm_eps=1e-5, rope_base=1e4, qkv_bias=family == "qwen2",
    )  # fmt: skip


@cache
def tensors(family: str) -> dict[str, np.ndarray]:
    """Returns random weights by their names in GGUF, fp32."""
    config = model_config(family)
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(item.shape(config), generator=generator) / 4 + (len(item.shape(config)) == 1)).numpy()
        for name, item in stored_tensors(architectures.get("llama"), config, "gguf").items()
    }


def write(path: Path, family: str = "llama", changes: dict | None = None, stored: dict | None = None) -> Path:
    """Writes a file. changes: metadata by key, added to the sizes; REMOVED leaves a key out; a tuple (value, type) or
    (value, Type.ARRAY, type) has a type of its own. stored: tensors by name, instead of the family's own.
    """
    writer = gguf.GGUFWriter(path, family)
    metadata = {f"{family}.{key}": value for key, value in SIZES.items()} | (changes or {})
    for key, value in metadata.items():
        if value is not REMOVED:
            add_value(writer, key, value)
    for name, tensor in (tensors(family) if stored is None else stored).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Adds a value under the type that it has, or that it names."""
    if isinstance(value, tuple):
        writer.add_key_value(key, *value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_key_value(key, value, Type.UINT32 if 0 <= value < 2**32 else Type.INT64)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, [], Type.ARRAY, Type.INT32)
