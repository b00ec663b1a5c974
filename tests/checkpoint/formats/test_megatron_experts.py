"""Mixtral and Qwen3-MoE in Megatron's files, exchanged with GPTModels of Megatron-core that have experts."""

from __future__ import annotations

import pytest
import torch
import transformers

from megatron_ligo.checkpoint import formats, verify
from megatron_ligo.checkpoint.convert import convert
from tests.checkpoint import hf_models
from tests.checkpoint.formats import expert_ranks
from tests.tiny_models import tokens

COMMON = {
    "vocab_size": 37, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 10, "max_position_embeddings": 64, "rms_norm_eps": 1e-3, "rope_theta": 5000.0,
    "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "mixtral": transformers.MixtralConfig(**COMMON, intermediate_size=28, num_local_experts=6),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON, moe_intermediate_size=20, num_experts=4, norm_topk_prob=False, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A Hugging Face folder for each family."""
    root = tmp_path_factory.mktemp("experts")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.uniform_(0.5, 1.5) if "norm" in key else parameter.normal_(0, 0.15)
        model.save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def expected_logits(folder):
    kernels = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kernels).eval()
    with torch.no_grad():
        return model(tokens(formats.open(folder).model_config)).logits


def test_megatron_core_loads_our_distributed_experts(pools, sources, tmp_path):
    """One by one and as a grouped product, over tensor- and expert-parallel ranks."""
    for name, folder in sources.items():
        convert(formats.open(folder), tmp_path / name, "mcore")
        back = formats.open(tmp_path / name)
        assert verify.compare(back, formats.open(folder)).same
    layouts = [("mixtral", 2, 2, False), ("qwen3_moe", 1, 4, False), ("mixtral", 2, 1, True), ("qwen3_moe", 2, 2, True)]
    jobs = [(str(tmp_path / name / "release"), str(sources[name]), *how) for name, *how in layouts]
    for (name, *_), logits in zip(layouts, pools(4).run(expert_ranks.load_experts, jobs=jobs), strict=True):
        if logits is not None:
            assert (logits - expected_logits(sources[name])).abs().max() < 5e-5


def test_distributed_experts_of_megatron_core_are_read(pools, sources, tmp_path):
    """Stacked, each alone, with separate layers; from the run's arguments alone."""
    cases = {
        "stacked": ("mixtral", 2, 2, False, {}),
        "alone": ("qwen3_moe", 1, 4, False, {"singleton_local_shards": True}),
        "layers": ("mixtral", 1, 2, False, {"non_homogeneous_layers": True}),
        "grouped": ("qwen3_moe", 2, 2, True, {}),
        "grouped alone": ("mixtral", 2, 2, True, {"singleton_local_shards": True}),
    }
    jobs = [(str(tmp_path / name), str(sources[of]), *how) for name, (of, *how) in cases.items()]
    pools(4).run(expert_ranks.save_experts, jobs=jobs)
    for name, (of, *_) in cases.items():
        reader, source = formats.open(tmp_path / name), formats.open(sources[of])
        assert reader.format == "mcore"
        hf_models.assert_same(reader, source)
