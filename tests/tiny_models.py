"""Tiny random models of the real classes, and a Reader over tensors in memory."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from megatron_ligo.arch import get
from megatron_ligo.arch.model_config import Dims
from megatron_ligo.checkpoint.reader import Info, Reader


def llama_dims(**changes) -> Dims:
    """Odd sizes on purpose: a head size that is no hidden / heads, a vocabulary that no power of two divides."""
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
    return Dims(**{**sizes, **changes})


def hf_llama(dims: Dims, seed: int = 0) -> LlamaForCausalLM:
    """A random Hugging Face Llama (Qwen2 where q, k, v have biases); its gains are no ones."""
    torch.manual_seed(seed)
    kinds = (Qwen2Config, Qwen2ForCausalLM) if dims.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    config = kinds[0](
        hidden_size=dims.hidden_size,
        intermediate_size=dims.ffn_size,
        num_hidden_layers=dims.num_layers,
        num_attention_heads=dims.num_heads,
        num_key_value_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        vocab_size=dims.vocab_size,
        max_position_embeddings=dims.max_positions,
        rms_norm_eps=dims.norm_eps,
        rope_theta=dims.rope_base,
        tie_word_embeddings=dims.tied,
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
    """A checkpoint that is a dict of canonical tensors."""

    format = "memory"
    path = None
    carried: dict = {}

    def __init__(self, dims: Dims, tensors: dict[str, torch.Tensor]):
        self.dims = dims
        self.tensors = tensors

    def info(self, key: str) -> Info:
        return Info(tuple(self.tensors[key].shape), self.tensors[key].dtype)

    def read(self, key: str, kind: str = "weight") -> torch.Tensor:
        return self.tensors[key]


def memory_of(model: LlamaForCausalLM, dims: Dims) -> Memory:
    """The canonical tensors of a Hugging Face model, by the table."""
    state = model.state_dict()
    arch = get(dims.arch)
    return Memory(dims, {key: state[hf_name(arch, key)].detach().clone() for key in arch.keys(dims)})


def hf_name(arch, key: str) -> str:
    number = key.split(".")[1] if key.startswith("layers.") else ""
    return arch.row(key).slots["hf"].name.format(number)


def hf_from(source: Reader) -> LlamaForCausalLM:
    """A Hugging Face model that holds a Reader's tensors."""
    state = {hf_name(source.arch, key): source.read(key) for key in source.keys()}  # noqa: SIM118
    model = hf_llama(source.dims).to(next(iter(state.values())).dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if source.dims.tied else set())
    return model


def tokens(dims: Dims, batch: int = 2, length: int = 16, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, dims.vocab_size, (batch, length), generator=generator)
    padding = dims.position_padding
    # transformers counts no positions for padding.
    return ids if padding is None else ids.masked_fill(ids == padding, padding + 1)
