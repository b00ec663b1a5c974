"""Fast digests (xxh3, 128 bits) of tensors and files. They detect damage, not an attacker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

CHUNK = 1 << 22


def as_bytes(tensor: Tensor) -> np.ndarray:
    """Returns the bytes of a tensor of any shape in row-major order, (nbytes,) uint8; a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """True if two tensors have equal dtype, shape and bits: NaN equals itself, 0.0 differs from -0.0."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


def hash_bytes(data: np.ndarray | bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def hash_file_part(path: Path, offset: int, size: int) -> str | None:
    """Returns the digest of `size` bytes of a file from `offset`; None if it has fewer."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(offset)
        while size:
            chunk = file.read(min(CHUNK, size))
            if not chunk:
                return None
            state.update(chunk)
            size -= len(chunk)
    return state.hexdigest()
