"""What the official LiGO classes computed on random weights, in float64, as our Reader and operator.

data/*.npz hold, in Hugging Face's names: `src/*` a small BERT with a masked-LM head, `op/emb`, `op/cls`,
`op/{layer}/{q,k,v,ffn}` the rows below each map's identity, `op/{layer}/w/{module}/{weight,bias}` the depth weights,
`dst/*` the grown model, `ids`, `logits_small`, `logits_large`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

from megatron_ligo.arch import get
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.config.run_config import OperatorSection
from megatron_ligo.growth.operator import Operator
from megatron_ligo.sharding.fused_tensors import stored_tensors
from tests.tiny_models import Memory

FILES = sorted((Path(__file__).parent / "data").glob("ligo_official_bert_*.npz"))
MODULES = {
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "o",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm2",
}
LAYER = "bert.encoder.layer"


class Given(Operator):
    """An operator that is a dict of tensors, of any dtype."""

    def __init__(self, small: ModelConfig, large: ModelConfig, settings: OperatorSection, tensors: dict[str, Tensor]):
        super().__init__(small, large, settings)
        assert set(tensors) == set(self.shapes())
        self.tensors = tensors

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class Case:
    source: Memory
    operator: Given
    expected: dict[str, Tensor]  # canonical keys of the large model
    ids: Tensor
    logits_small: Tensor
    logits_large: Tensor


def load(path: Path, head_dim: int | None = None) -> Case:
    """The file's numbers, float64. The arithmetic knows no heads: with another head size all but the logits hold."""
    raw = _raw(path)
    source, expected = (_part(raw, prefix) for prefix in ("src/", "dst/"))
    small, large = (_dims(part, head_dim or head_dim_of(path)) for part in (source, expected))
    operator = Given(small, large, OperatorSection(method="ligo"), _tensors(raw, small, large))
    return Case(
        Memory(small, _canonical(source, small)),
        operator,
        _canonical(expected, large),
        raw["ids"],
        raw["logits_small"],
        raw["logits_large"],
    )


def bert(model_config: ModelConfig) -> BertForMaskedLM:
    config = config_json.to_hf_config(model_config, {}, torch.float64)
    return BertForMaskedLM(BertConfig(**config)).double().eval()


def head_dims(path: Path) -> list[int]:
    """Head sizes that divide both models, the largest first."""
    raw = _raw(path)
    common = gcd(*(raw[f"{part}/bert.embeddings.LayerNorm.weight"].shape[0] for part in ("src", "dst")))
    return [size for size in range(common, 0, -1) if common % size == 0]


@cache
def head_dim_of(path: Path) -> int:
    """The files do not say it: it is the one that gives their small model's logits."""
    raw = _raw(path)
    source = _part(raw, "src/")
    for size in head_dims(path):
        model = bert(_dims(source, size))
        model.load_state_dict(source, strict=False)
        with torch.no_grad():
            if torch.allclose(model(raw["ids"]).logits, raw["logits_small"], rtol=1e-12, atol=1e-13):
                return size
    raise AssertionError(f"{path.name}: no size of heads gives its logits_small")


def _raw(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in np.load(path, allow_pickle=False).items()}


def with_identity(rows: Tensor) -> Tensor:
    """The rows below, and the identity above them."""
    return torch.cat([torch.eye(rows.shape[1], dtype=rows.dtype), rows])


def _part(raw: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in raw.items() if name.startswith(prefix)}


def _dims(state: dict[str, Tensor], head_dim: int) -> ModelConfig:
    vocab, hidden = state["bert.embeddings.word_embeddings.weight"].shape
    layers = {name.split(".")[3] for name in state if name.startswith(LAYER)}
    return ModelConfig(
        arch="bert",
        model_type="bert",
        num_layers=len(layers),
        hidden_size=hidden,
        ffn_size=state[f"{LAYER}.0.intermediate.dense.weight"].shape[0],
        num_heads=hidden // head_dim,
        num_kv_heads=hidden // head_dim,
        head_dim=head_dim,
        vocab_size=vocab,
        max_positions=state["bert.embeddings.position_embeddings.weight"].shape[0],
        num_token_types=state["bert.embeddings.token_type_embeddings.weight"].shape[0],
        norm_eps=1e-12,
        activation="gelu",
    )


def _canonical(state: dict[str, Tensor], model_config: ModelConfig) -> dict[str, Tensor]:
    items = stored_tensors(get("bert"), model_config, "hf")
    left = set(state) - set(items) - {"bert.embeddings.position_ids"}
    assert not left, f"the table has no place for {left}"
    return {key: item.extract(state[name], key, model_config) for name, item in items.items() for key in item.keys}


def _tensors(raw: dict[str, Tensor], small: ModelConfig, large: ModelConfig) -> dict[str, Tensor]:
    layers = range(large.num_layers)
    tensors = {
        "width.residual.expand": with_identity(raw["op/emb"]),
        "width.head.expand": with_identity(raw["op/cls"]),
    }
    for layer in layers:
        for name in ("q", "k", "v", "ffn"):
            tensors[f"width.{name}.{layer}.expand"] = with_identity(raw[f"op/{layer}/{name}"])
    for module, row in MODULES.items():
        for kind, ending in (("weight", ""), ("bias", "_bias")):
            rows = [raw[f"op/{layer}/w/{module}/{kind}"] for layer in layers]
            tensors[f"depth.{row}{ending}"] = torch.stack(rows)
    return tensors
