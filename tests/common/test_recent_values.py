"""Values used last are kept within a number and a number of bytes."""

from __future__ import annotations

import pytest
import torch

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.recent_values import RecentValues
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.growth import operator
from megatron_ligo.growth.validation import build_initial_operator


def test_the_oldest_values_are_dropped():
    kept = RecentValues(count=3, limit=100)
    for name in "abc":
        kept.put(name, name.upper(), 10)
    assert kept.get("a") == "A" and kept.get("x") is None
    kept.put("d", "D", 10)
    assert kept.get("b") is None and kept.get("a") == "A" and kept.nbytes == 30
    kept.put("e", "E", 75)
    assert (len(kept), kept.nbytes) == (3, 95) and kept.get("c") is None
    kept.put("f", "F", 1000)
    assert (len(kept), kept.nbytes) == (1, 1000) and kept.get("f") == "F"
    kept.put("g", "G", 1)
    assert (len(kept), kept.nbytes) == (1, 1)


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_an_operator_keeps_few_bytes(monkeypatch, limit):
    """Grown weights do not depend on the bound."""
    small = ModelConfig("llama", "llama", 2, 24, 32, 4, 2, 6, 64, 32, 1e-6)
    section = LargeSection(num_layers=3, hidden_size=36, ffn_size=48, num_heads=6, num_kv_heads=3)
    settings = OperatorSection(noise=0.1)
    weights = {key: torch.randn(shape) for key, shape in (("q", (24, 24)), ("up", (32, 24)), ("down", (24, 32)))}
    expected = {
        key: build_initial_operator(small, section, settings).grow(f"layers.0.{key}", w) for key, w in weights.items()
    }
    monkeypatch.setattr(operator, "CACHE_BYTES", limit)
    chosen = build_initial_operator(small, section, settings)
    for key, weight in weights.items():
        assert torch.equal(chosen.grow(f"layers.0.{key}", weight), expected[key])
        assert chosen._cached_forms.nbytes <= limit or len(chosen._cached_forms) == 1
    assert len(chosen._cached_forms) > 1 or not limit
