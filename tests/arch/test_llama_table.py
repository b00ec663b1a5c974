"""The table against the real models: every stored row is there with its shape, and nothing is there besides."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_ligo.arch import architectures, get
from megatron_ligo.distributed import mesh
from megatron_ligo.models.full.gpt import FullGPT
from megatron_ligo.models.mcore.layer_spec import BuildOptions
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests.tiny_models import llama_config

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
FAMILIES = [
    pytest.param({"model_type": kind, "qkv_bias": kind == "qwen2", "tied": tied}, id=f"{kind}{'-tied' * tied}")
    for kind in CONFIGS
    for tied in (False, True)
]


def dims_of(family: dict):
    """Every size another, so that a transposed or mixed-up axis shows."""
    return llama_config(**family)


def hf_model(model_config) -> torch.nn.Module:
    config = CONFIGS[model_config.model_type](
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.ffn_size,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.num_heads,
        num_key_value_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        max_position_embeddings=model_config.max_positions,
        tie_word_embeddings=model_config.tied,
    )
    return MODELS[model_config.model_type](config)


def mcore_model(model_config) -> torch.nn.Module:
    mesh.init_distributed()
    return FullGPT(model_config, BuildOptions(), mesh.build_mesh(1, 1))


def expected(model_config, form: str) -> dict[str, tuple[int, ...]]:
    return {
        name: item.shape(model_config)
        for name, item in stored_tensors(get(model_config.arch), model_config, form).items()
    }


def test_sizes_distinguish_axes():
    model_config = llama_config()
    sizes = [
        model_config.vocab_size,
        model_config.hidden_size,
        model_config.ffn_size,
        model_config.num_kv_heads * model_config.head_dim,
    ]
    assert len(set(sizes)) == len(sizes)


def test_every_model_type_of_the_table_is_tested():
    assert set(architectures()["llama"].model_types) == set(MODELS)
    for name, model in MODELS.items():
        assert list(architectures()["llama"].model_types[name]) == [model.__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face(family):
    model_config = dims_of(family)
    result = {name: tuple(tensor.shape) for name, tensor in hf_model(model_config).state_dict().items()}
    if model_config.tied:
        # transformers lists the shared tensor under both names; a file holds it once.
        assert result.pop("lm_head.weight") == result["model.embed_tokens.weight"]
    assert result == expected(model_config, "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_core(family):
    model_config = dims_of(family)
    model = mcore_model(model_config)
    result = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert result == expected(model_config, "mcore")
    # What is in the state dict besides (mcore keeps places for Transformer Engine's state) holds no numbers.
    more = {name: value for name, value in model.state_dict().items() if name not in result}
    assert not [name for name, value in more.items() if isinstance(value, torch.Tensor) and value.numel()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_table_is_detected(family):
    """The negative control: the sizes of another model give other shapes."""
    model_config = dims_of(family)
    other = llama_config(**family, num_kv_heads=6)
    assert expected(model_config, "hf") != expected(other, "hf")
    assert expected(model_config, "mcore") != expected(other, "mcore")
