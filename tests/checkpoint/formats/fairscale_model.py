"""A Llama of fairscale's own parallel layers, saved as in Meta's releases; cases for the ranks of `pools`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fairscale.nn.model_parallel import initialize
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from torch import Tensor, nn
from torch.nn import functional as F

from tests.checkpoint import hf_models

LLAMA_2 = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 6,
    "n_kv_heads": 2,
    "vocab_size": -1,
    "multiple_of": 4,
    "norm_eps": 1e-3,
}
LLAMA_3 = {**LLAMA_2, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0, "use_scaled_rope": False, "n_heads": 4}
VOCABULARY = 38
EMBEDDINGS = {"features": ParallelEmbedding, "vocabulary": VocabParallelEmbedding}


def column(inside: int, outside: int, gather: bool = False) -> ColumnParallelLinear:
    return ColumnParallelLinear(inside, outside, bias=False, gather_output=gather)


def row(inside: int, outside: int) -> RowParallelLinear:
    return RowParallelLinear(inside, outside, bias=False, input_is_parallel=True)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int):
        super().__init__()
        self.size = dim // heads
        self.wq = column(dim, heads * self.size)
        self.wk = column(dim, kv_heads * self.size)
        self.wv = column(dim, kv_heads * self.size)
        self.wo = row(heads * self.size, dim)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = (turned(heads, turns) for heads in (q, k))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


def turned(heads: Tensor, turns: Tensor) -> Tensor:
    """Rotates pairs of neighbouring features as complex numbers."""
    pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn: int):
        super().__init__()
        self.w1, self.w2, self.w3 = column(dim, ffn), row(ffn, dim), column(dim, ffn)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, params: dict):
        super().__init__()
        dim, eps = params["dim"], params["norm_eps"]
        self.attention = Attention(dim, params["n_heads"], params["n_kv_heads"])
        self.feed_forward = FeedForward(dim, ffn_size(params))
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns)
        return x + self.feed_forward(self.ffn_norm(x))


def ffn_size(params: dict) -> int:
    size = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    return -(-size // params["multiple_of"]) * params["multiple_of"]


class Llama(nn.Module):
    def __init__(self, params: dict, cut: str):
        super().__init__()
        self.tok_embeddings = EMBEDDINGS[cut](params["vocab_size"], params["dim"])
        self.layers = nn.ModuleList(Block(params) for _ in range(params["n_layers"]))
        self.norm = nn.RMSNorm(params["dim"], params["norm_eps"])
        self.output = column(params["dim"], params["vocab_size"], gather=True)
        size, base = params["dim"] // params["n_heads"], params.get("rope_theta", 10000.0)
        angles = torch.outer(torch.arange(64.0), base ** (-torch.arange(0, size, 2) / size))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.turns[: ids.shape[1]])
        return self.output(self.norm(x))


def ranks(cut: str, params: dict) -> tuple[Llama, int]:
    """Builds the model in one model-parallel group of all ranks. Returns it and this rank."""
    if not initialize.model_parallel_is_initialized():
        initialize.initialize_model_parallel(torch.distributed.get_world_size())
    return Llama(params, cut), initialize.get_model_parallel_rank()


@torch.no_grad()
def save(folder: str, cut: str, params: dict) -> list:
    """Saves a random model rank by rank as Meta does, and returns its outputs."""
    torch.manual_seed(0)
    model, rank = ranks(cut, {**params, "vocab_size": VOCABULARY})
    torch.manual_seed(rank)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.normal_(0, 0.15)
    torch.manual_seed(99)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5)
    state = {**model.state_dict(), "rope.freqs": torch.ones(3)}
    torch.save(state, Path(folder) / f"consolidated.{rank:02d}.pth")
    if rank == 0:
        (Path(folder) / "params.json").write_text(json.dumps(params))
    return model(hf_models.tokens(VOCABULARY)).tolist()


@torch.no_grad()
def load(folder: str, cut: str) -> list:
    """Has each rank load its own file, and returns the logits that the layers compute."""
    params = json.loads((Path(folder) / "params.json").read_text())
    model, rank = ranks(cut, params)
    model.load_state_dict(torch.load(Path(folder) / f"consolidated.{rank:02d}.pth", weights_only=True, mmap=True))
    return model(hf_models.tokens()).tolist()
