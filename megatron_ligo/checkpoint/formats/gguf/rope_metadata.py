"""Reads a GGUF file's rope scaling: a rule in its metadata, or Llama 3.1's table of factors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader
from megatron_ligo.common.errors import ErrorCollector

FACTORS = "rope_freqs.weight"
# The constants of the rule behind llama.cpp's table. All releases of Llama 3.1 to 3.3 share them; `factor` differs.
LOW, HIGH, CONTEXT = 1.0, 4.0, 8192
CLOSE = 1e-5


def shortest_decimal(value: float) -> float:
    """Returns the shortest decimal of the same fp32 number: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def parse_rope_scaling(
    header: GgufHeader, path: Path, family: str, head_dim: int, base: float, errors: ErrorCollector
) -> dict | None:
    """Returns the scaling part of Hugging Face's rope parameters, or None. Adds an error if they cannot express it."""
    kind = header.metadata.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        errors.add("rope.scaling.type", "none or linear", kind)
        return None
    if FACTORS in header.tensors:
        return _match_table(header, path, head_dim, base, errors)
    factor = header.metadata.get(f"{family}.rope.scaling.factor")
    return {"rope_type": "linear", "factor": shortest_decimal(factor)} if kind == "linear" and factor else None


def _match_table(header: GgufHeader, path: Path, head_dim: int, base: float, errors: ErrorCollector) -> dict | None:
    block = header.tensors[FACTORS]
    hint = "Use the model's Hugging Face files: their config states the rule."
    if block.shape != (head_dim // 2,) or block.nbytes != 2 * head_dim:
        errors.add(FACTORS, f"fp32 of shape ({head_dim // 2},)", f"{block.type.name} of shape {block.shape}", hint)
        return None
    factors = np.fromfile(path, dtype="<f4", count=head_dim // 2, offset=block.offset)
    # Files written by dividing frequencies are off by an ulp.
    factor = round(float(factors.max()), 3)
    expected = [_llama3_factor(base ** (-2 * i / head_dim), factor) for i in range(head_dim // 2)]
    if not np.allclose(factors, expected, rtol=CLOSE, atol=0):
        errors.add(FACTORS, f"the factors of Llama 3.1's rule with factor {factor}", "other values", hint)
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": CONTEXT,
    }


def _llama3_factor(frequency: float, factor: float) -> float:
    """Returns Llama 3.1's divisor of a frequency: 1 at short wavelengths, `factor` at long ones, smooth between."""
    waves = CONTEXT * frequency / (2 * math.pi)
    if waves > HIGH:
        return 1.0
    if waves < LOW:
        return factor
    smooth = (waves - LOW) / (HIGH - LOW)
    return 1 / ((1 - smooth) / factor + smooth)
