"""Layouts of Megatron-LM's rank files that this program reads and does not write: parts of stages, cut KV groups."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers

import megatron_ligo as ligo
from megatron_ligo.checkpoint.formats.megatron_lm.rank_files import rank_file
from tests.checkpoint import hf_models

SIZES = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 4, "intermediate_size": 56}


def load(folder: Path, tp_rank: int, stage: int, pp: int) -> dict:
    return torch.load(folder / "release" / rank_file(tp_rank, stage, pp), weights_only=False)


def save(folder: Path, state: dict, tp_rank: int, stage: int, pp: int) -> None:
    path = folder / "release" / rank_file(tp_rank, stage, pp)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def copy_sizes(source: Path, target: Path) -> None:
    target.mkdir()
    for file in (*source.glob("*.json"), *source.glob("*.txt")):
        if file.name != "manifest.json":
            shutil.copy(file, target)


def test_the_parts_of_an_interleaved_pipeline(tmp_path):
    """Two stages of two parts: the first holds layers 0 and 2, the second 1 and 3."""
    model = hf_models.model(**SIZES)
    ligo.convert(model, tmp_path / "plain", to="megatron", tp=2, pp=4)
    copy_sizes(tmp_path / "plain", tmp_path / "parts")
    for tp_rank in range(2):
        stages = [load(tmp_path / "plain", tp_rank, stage, 4) for stage in range(4)]
        for stage in range(2):
            state = {**stages[stage], "model0": stages[stage]["model"], "model1": stages[stage + 2]["model"]}
            save(tmp_path / "parts", {key: state[key] for key in state if key != "model"}, tp_rank, stage, 2)
    assert ligo.verify(tmp_path / "parts", model).same
    assert ligo.inspect(tmp_path / "parts")["layout"] == {"tp": 2, "pp": 2, "padded_vocab": 256}
    state = load(tmp_path / "parts", 1, 1, 2)
    del state["model1"]
    save(tmp_path / "parts", state, 1, 1, 2)
    with pytest.raises(ligo.CheckpointError, match=r"mp_rank_01_001.*model0 and model1"):
        ligo.inspect(tmp_path / "parts")


def cut(name: str, tensor: torch.Tensor, tp: int) -> list[torch.Tensor]:
    """Returns the ranks' shards of a tensor as Megatron-core cuts it; queries, keys and values by plain rows."""
    if "linear_fc1.weight" in name:
        gate, up = tensor.chunk(2)
        return [torch.cat(parts) for parts in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    if "linear_proj" in name or "linear_fc2" in name:
        return list(tensor.chunk(tp, dim=1))
    if "norm" in name:
        return [tensor] * tp
    return list(tensor.chunk(tp))


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_fewer_kv_groups_than_ranks(tmp_path, model_type):
    model = hf_models.model(model_type, **SIZES, vocab_size=40)
    ligo.convert(model, tmp_path / "whole", to="megatron")
    copy_sizes(tmp_path / "whole", tmp_path / "cut")
    whole = load(tmp_path / "whole", 0, 0, 1)
    shards = {
        name: cut(name, tensor, 4) if isinstance(tensor, torch.Tensor) else [tensor] * 4
        for name, tensor in whole["model"].items()
    }
    for rank in range(4):
        state = {**whole, "model": {name: pieces[rank].clone() if torch.is_tensor(pieces[rank]) else pieces[rank]
                                    for name, pieces in shards.items()}}  # fmt: skip
        save(tmp_path / "cut", state, rank, 0, 1)
    assert ligo.verify(tmp_path / "cut", model).same


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("mistral", {"sliding_window": 8})],
    ids=["llama", "qwen2", "mistral"],
)
def test_a_run_config_for_megatron_bridge(tmp_path, model_type, changes):
    """The sizes are read from run_config.yaml and from the args alone, and both are those of the model."""
    model = hf_models.model(model_type, **changes)
    ligo.convert(model, tmp_path / "bridge", to="mcore", options={"bridge": True})
    folder = tmp_path / "bridge" / "iter_0000000"
    assert (folder / "run_config.yaml").is_file() and (folder / ".metadata").is_file()
    assert ligo.verify(tmp_path / "bridge", model).same
    (tmp_path / "bridge" / "dims.json").unlink()
    # The model_type is a word of Hugging Face's.
    expected = {**ligo.inspect(model)["dims"], "model_type": "x"}
    assert {**ligo.inspect(folder)["dims"], "model_type": "x"} == expected
    text = (folder / "run_config.yaml").read_text()
    (folder / "run_config.yaml").write_text(text.replace("num_query_groups: 2", "num_query_groups: 3"))
    with pytest.raises(ligo.LigoError, match="num_kv_heads"):
        ligo.inspect(folder)


def test_a_run_config_states_every_field_or_is_refused(tmp_path):
    small = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small))
    with pytest.raises(ligo.ConfigError, match="bridge"):
        ligo.convert(model, tmp_path / "bridge", to="mcore", options={"bridge": True})
