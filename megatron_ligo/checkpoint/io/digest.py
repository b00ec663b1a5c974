"""Digests (xxh3, 128 bits) of tensors; those of files are in common/file_digest.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_ligo.common.file_digest import hash_bytes, hash_file_part

__all__ = ["as_bytes", "hash_bytes", "hash_file_part", "same_bits"]


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Returns the bytes of a tensor of any shape in row-major order, (nbytes,) uint8; a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have equal dtype, shape and bits: NaN equals itself, 0.0 differs from -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))
