"""A synthetic Llama of any size whose tensors are computed on demand, like those of a grown model."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.reader import WEIGHT, Reader, TensorInfo

HEAD_DIM = 64
VOCAB_SIZE = 32_000
# With this many layers, no tensor is a large part of the model.
MIN_LAYERS = 8


class SyntheticReader(Reader):
    """Reads tensors of normally distributed numbers, seeded by the key."""

    format = "drawn"
    path = None

    def __init__(self, model_config: ModelConfig, dtype: torch.dtype = torch.float32):
        self.model_config = model_config
        self.dtype = dtype

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(self.param(key).shape(self.model_config), self.dtype)

    def read(self, key: str, kind: str = WEIGHT) -> Tensor:
        """Returns the whole tensor of a canonical key, in its global shape."""
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.randn(self.param(key).shape(self.model_config), generator=generator).to(self.dtype)

    def fingerprint(self) -> object:
        return ["drawn", self.model_config.to_json()]


def synthetic_llama_config(nbytes: float) -> ModelConfig:
    """Returns sizes of about `nbytes` in fp32 in realistic proportions: GQA, head size 64, ffn 2.75 x hidden."""
    hidden, vocab = 2048, VOCAB_SIZE
    while hidden > 4 * HEAD_DIM and _count_layers(nbytes, hidden, vocab) < MIN_LAYERS:
        hidden, vocab = hidden // 2, vocab // 2
    return ModelConfig(
        arch="llama",
        model_type="llama",
        num_layers=max(round(_count_layers(nbytes, hidden, vocab)), 1),
        hidden_size=hidden,
        ffn_size=hidden * 11 // 4,
        num_heads=hidden // HEAD_DIM,
        num_kv_heads=hidden // HEAD_DIM // 2,
        head_dim=HEAD_DIM,
        vocab_size=vocab,
        max_positions=2048,
        norm_eps=1e-5,
        rope_base=10000.0,
    )


def _count_layers(nbytes: float, hidden: int, vocab: int) -> float:
    """Returns the layers (q, k, v, o, gate, up, down) that fill `nbytes` beside the embedding and the head."""
    layer = hidden * hidden * (2 + 1 + 3 * 11 / 4)
    return (nbytes / 4 - 2 * vocab * hidden) / layer
