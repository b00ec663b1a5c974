"""Random generators that depend only on a seed and a name, not on the parallel layout or the order of calls."""

from __future__ import annotations

import hashlib

import torch


def seeded_generator(seed: int | str, name: object) -> torch.Generator:
    """Returns a CPU generator seeded by the first seven bytes of SHA-256 of `seed:name`, little endian."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
