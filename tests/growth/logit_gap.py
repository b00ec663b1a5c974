"""The difference that growth makes to a tiny model's logits, in fp64 but for the norms."""

from __future__ import annotations

import torch

from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_from, hf_llama, memory_of, tokens

RAGGED = LargeSection(num_layers=5, hidden_size=32, ffn_size=44, num_heads=8, num_kv_heads=4)


def logits_gap(small, large: LargeSection, settings: OperatorSection) -> float:
    """Largest difference, at logits of size 5."""
    model = hf_llama(small).double()
    grown = hf_from(GrownReader(build_initial_operator(small, large, settings), memory_of(model, small)))
    ids = tokens(small)
    with torch.no_grad():
        return float((model(ids).logits - grown(ids).logits).abs().max())
