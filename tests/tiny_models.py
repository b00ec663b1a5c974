"""Tiny random models of the real classes, and a Reader over tensors in memory."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_ligo.arch import get
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.reader import Reader, TensorInfo


def llama_config(**changes) -> ModelConfig:
    """Returns uncommon sizes: head_dim is not hidden / heads, no power of two divides the vocabulary."""
    sizes = {
        "arch": "llama",
        "model_type": "llama",
        "num_layers": 3,
        "hidden_size": 24,  # transformers insists on a multiple of num_heads
        "ffn_size": 28,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 4,
        "vocab_size": 37,
        "max_positions": 64,
        "norm_eps": 1e-3,
        "tied": False,
        "rope_base": 10000.0,
    }
    return ModelConfig(**{**sizes, **changes})


def hf_llama(model_config: ModelConfig, seed: int = 0) -> LlamaForCausalLM:
    """Returns a random Hugging Face Llama (Qwen2 if q, k and v have biases) whose gains differ from 1."""
    torch.manual_seed(seed)
    kinds = (Qwen2Config, Qwen2ForCausalLM) if model_config.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    config = kinds[0](
        hidden_size=model_config.hidden_size,
        intermediate_size=model_config.ffn_size,
        num_hidden_layers=model_config.num_layers,
        num_attention_heads=model_config.num_heads,
        num_key_value_heads=model_config.num_kv_heads,
        head_dim=model_config.head_dim,
        vocab_size=model_config.vocab_size,
        max_position_embeddings=model_config.max_positions,
        rms_norm_eps=model_config.norm_eps,
        rope_theta=model_config.rope_base,
        # A copy: transformers modifies it.
        rope_scaling=dict(model_config.rope_scaling or {}),
        tie_word_embeddings=model_config.tied,
        attn_implementation="sdpa",
    )
    model = kinds[1](config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.15)
    return model


class Memory(Reader):
    """A checkpoint in memory: a dict of canonical tensors."""

    format = "memory"
    path = None
    carried: dict = {}

    def __init__(self, model_config: ModelConfig, tensors: dict[str, torch.Tensor]):
        self.model_config = model_config
        self.tensors = tensors

    def info(self, key: str) -> TensorInfo:
        return TensorInfo(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def read(self, key: str, kind: str = "weight") -> torch.Tensor:
        return self.tensors[key]


def memory_of(model: LlamaForCausalLM, model_config: ModelConfig) -> Memory:
    """Returns a Reader of a Hugging Face model's canonical tensors, found by the table."""
    state = model.state_dict()
    arch = get(model_config.arch)
    return Memory(model_config, {key: state[hf_name(arch, key)].detach().clone() for key in arch.keys(model_config)})


def hf_name(arch, key: str) -> str:
    number = key.split(".")[1] if key.startswith("layers.") else ""
    return arch.param(key).locations["hf"].name.format(number)


def hf_from(source: Reader) -> LlamaForCausalLM:
    """Returns a Hugging Face model with a Reader's tensors."""
    state = {hf_name(source.arch, key): source.read(key) for key in source.keys()}  # noqa: SIM118
    model = hf_llama(source.model_config).to(next(iter(state.values())).dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if source.model_config.tied else set())
    return model


def tokens(model_config: ModelConfig, batch: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model_config.vocab_size, (batch, length), generator=generator)
    padding = model_config.position_padding
    # transformers gives padding no positions.
    return ids if padding is None else ids.masked_fill(ids == padding, padding + 1)
