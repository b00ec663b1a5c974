"""The table against the real models: every stored row is there with its shape, and nothing is there besides."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_ligo.arch import architectures, get
from megatron_ligo.distributed import mesh
from megatron_ligo.models.full.gpt import Pretrained
from megatron_ligo.models.mcore.layer_spec import Build
from megatron_ligo.sharding.fused_tensors import stored
from tests.tiny_models import llama_dims

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
MODELS = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "qwen2": Qwen2ForCausalLM}
FAMILIES = [
    pytest.param({"model_type": kind, "qkv_bias": kind == "qwen2", "tied": tied}, id=f"{kind}{'-tied' * tied}")
    for kind in CONFIGS
    for tied in (False, True)
]


def dims_of(family: dict):
    """Every size another, so that a transposed or mixed-up axis shows."""
    return llama_dims(**family)


def hf_model(dims) -> torch.nn.Module:
    config = CONFIGS[dims.model_type](
        hidden_size=dims.hidden_size,
        intermediate_size=dims.ffn_size,
        num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        max_position_embeddings=dims.max_positions,
        tie_word_embeddings=dims.tied,
    )
    return MODELS[dims.model_type](config)


def mcore_model(dims) -> torch.nn.Module:
    mesh.start()
    return Pretrained(dims, Build(), mesh.make(1, 1))


def expected(dims, form: str) -> dict[str, tuple[int, ...]]:
    return {name: item.shape(dims) for name, item in stored(get(dims.arch), dims, form).items()}


def test_the_sizes_tell_the_axes_apart():
    dims = llama_dims()
    sizes = [dims.vocab_size, dims.hidden_size, dims.ffn_size, dims.num_kv_heads * dims.head_dim]
    assert len(set(sizes)) == len(sizes)


def test_every_model_type_of_the_table_is_tried():
    assert set(architectures()["llama"].model_types) == set(MODELS)
    for name, model in MODELS.items():
        assert list(architectures()["llama"].model_types[name]) == [model.__name__]


@pytest.mark.parametrize("family", FAMILIES)
def test_hugging_face(family):
    dims = dims_of(family)
    found = {name: tuple(tensor.shape) for name, tensor in hf_model(dims).state_dict().items()}
    if dims.tied:
        # transformers lists the shared tensor under both names; a file holds it once.
        assert found.pop("lm_head.weight") == found["model.embed_tokens.weight"]
    assert found == expected(dims, "hf")


@pytest.mark.parametrize("family", FAMILIES)
def test_megatron_core(family):
    dims = dims_of(family)
    model = mcore_model(dims)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == expected(dims, "mcore")
    # What is in the state dict besides (mcore keeps places for Transformer Engine's state) holds no numbers.
    more = {name: value for name, value in model.state_dict().items() if name not in found}
    assert not [name for name, value in more.items() if isinstance(value, torch.Tensor) and value.numel()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_wrong_table_would_show(family):
    """The negative control: the sizes of another model give other shapes."""
    dims = dims_of(family)
    other = llama_dims(**family, num_kv_heads=6)
    assert expected(dims, "hf") != expected(other, "hf")
    assert expected(dims, "mcore") != expected(other, "mcore")
