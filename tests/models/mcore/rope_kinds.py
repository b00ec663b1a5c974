"""Scalings of every kind for a head of few pairs, and random ones."""

from __future__ import annotations

import random

ORIGINAL = "original_max_position_embeddings"
# Their angles differ from the unscaled ones within 16 tokens, at 2 pairs of base 10000.
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 8},
    "yarn with a factor": {
        "rope_type": "yarn", "factor": 4.0, ORIGINAL: 12, "attention_factor": 1.7, "truncate": False, "beta_fast": 2.0,
    },
    "yarn of DeepSeek": {
        "rope_type": "yarn", "factor": 40.0, ORIGINAL: 8, "mscale": 0.707, "mscale_all_dim": 1.3, "beta_slow": 0.25,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8,
    },
    "longrope": {
        "rope_type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [3.0, 7.0], ORIGINAL: 32, "factor": 8.0,
    },
    "longrope, long": {
        "rope_type": "longrope", "short_factor": [1.5, 2.5], "long_factor": [3.0, 7.0], ORIGINAL: 10,
        "attention_factor": 0.8,
    },
}  # fmt: skip


def draw(kind: str, num_pairs: int, rng: random.Random) -> dict:
    """Returns a random scaling of a kind; each optional key is stated in half of the draws."""
    scaling = {"rope_type": kind, "factor": rng.choice([0.5, 1.0, 2, 4.0, 7.25, 40.0])}
    original = rng.choice([16, 64, 100, 4096])
    if kind == "yarn":
        optional = {
            "attention_factor": rng.uniform(0.5, 2.0),
            "beta_fast": rng.choice([1.5, 8.0, 32.0, 0]),
            "beta_slow": rng.choice([0.1, 1.0, 2.0]),
            "mscale": rng.choice([0.0, 0.7, 1.0]),
            "mscale_all_dim": rng.choice([0.0, 1.0, 1.4]),
            "truncate": rng.choice([True, False, None]),
        }
        scaling |= {key: value for key, value in optional.items() if rng.random() < 0.5}
    if kind == "llama3":
        low = rng.choice([0.5, 1.0, 2])
        scaling |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([1.0, 1.5, 4.0])}
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            scaling[key] = [rng.uniform(1.0, 9.0) for _ in range(num_pairs)]
        if rng.random() < 0.3:
            scaling["attention_factor"] = rng.uniform(0.5, 2.0)
        if rng.random() < 0.3:
            scaling["factor"] = None
    if kind in ("yarn", "llama3", "longrope") and rng.random() < 0.8:
        scaling[ORIGINAL] = original
    return scaling
