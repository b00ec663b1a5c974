"""torch.distributed.checkpoint: what FSDP2 saves is read, and what is written FSDP2 loads; torchtitan's names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import megatron_ligo as ligo
from megatron_ligo.sharding.fused_tensors import interleave
from tests.checkpoint import hf_models


def sharded(folder: str | None = None, seed: int = 0, tied: bool = False) -> torch.nn.Module:
    """Returns a model that FSDP2 shards over all ranks; with its config.json in `folder`."""
    model = hf_models.model(seed=seed, tied=tied)
    if folder is not None and dist.get_rank() == 0:
        model.config.save_pretrained(folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def save(folder: str, plain: bool) -> None:
    """Saves a model after a step, as PyTorch's recipe does with its optimizer, or the model alone."""
    model = sharded(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if plain:
        dcp.save(model.state_dict(), checkpoint_id=folder)
    else:
        model(hf_models.tokens(), labels=hf_models.tokens()).loss.backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
        whole = {name: tensor.full_tensor() for name, tensor in weights.items()}
        if dist.get_rank() == 0:
            torch.save(whole, f"{folder}/whole.pt")


def load(folder: str, tied: bool) -> list[str]:
    """Loads a checkpoint of ours into another model; returns the tensors that then differ from the original's."""
    model, expected = sharded(seed=1, tied=tied), hf_models.model(tied=tied).state_dict()
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    loaded = {name: value.full_tensor() for name, value in state["model"].items() if isinstance(value, DTensor)}
    assert loaded.keys() == expected.keys()
    return [name for name, tensor in loaded.items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("plain", [False, True], ids=["model and optimizer", "model"])
def test_what_fsdp2_saves_is_read(pools, tmp_path, plain):
    folder = tmp_path / "dcp"
    folder.mkdir()
    pools(2).run(save, folder=str(folder), plain=plain)
    whole = hf_models.model().state_dict() if plain else torch.load(folder / "whole.pt")
    (folder / "whole.pt").unlink(missing_ok=True)
    expected = ligo.open_state_dict(whole, hf_models.model().config)
    assert ligo.verify(folder, expected).same
    summary = ligo.inspect(folder)
    assert summary["format"] == "fsdp" and bool(summary["unread"]) is not plain
    # Accelerate's folder, with the config where the Trainer leaves it.
    accelerate = tmp_path / "checkpoint-2"
    shutil.copytree(folder, accelerate / "pytorch_model_fsdp_0")
    (accelerate / "pytorch_model_fsdp_0" / "config.json").rename(accelerate / "config.json")
    assert ligo.verify(accelerate, expected).same
    (accelerate / "optimizer_0").mkdir()
    assert ligo.inspect(accelerate)["unread"][-1] == "optimizer state (optimizer_0: in the trainer's own form)"
    (accelerate / "config.json").unlink()
    with pytest.raises(ligo.CheckpointError, match=r"config\.json"):
        ligo.inspect(accelerate)


@pytest.mark.parametrize("tied", [False, True])
def test_fsdp2_loads_what_is_written(pools, tmp_path, tied):
    model = hf_models.model(tied=tied)
    ligo.convert(model, tmp_path / "dcp", to="fsdp")
    assert ligo.verify(tmp_path / "dcp", model).same
    different = pools(2).run(load, folder=str(tmp_path / "dcp"), tied=tied)
    assert different == []


@pytest.mark.parametrize("tied", [False, True])
def test_torchtitans_names_and_order(tmp_path, tied):
    """torchtitan 0.3.0's own form: Meta's order of rotary pairs, and a tied head as a tensor of its own."""
    model = hf_models.model(tied=tied)
    ligo.convert(model, tmp_path / "titan", to="torchtitan")
    metadata = dcp.FileSystemReader(tmp_path / "titan").read_metadata()
    state = {name: torch.empty(entry.size) for name, entry in metadata.state_dict_metadata.items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "titan"), no_dist=True)
    layer = model.model.layers[0]
    expected = {
        "tok_embeddings.weight": model.model.embed_tokens.weight,
        "layers.0.attention.qkv_linear.wq.weight": interleave(layer.self_attn.q_proj.weight, 10),
        "layers.0.attention.qkv_linear.wk.weight": interleave(layer.self_attn.k_proj.weight, 10),
        "layers.0.attention.qkv_linear.wv.weight": layer.self_attn.v_proj.weight,
        "layers.0.attention.wo.weight": layer.self_attn.o_proj.weight,
        "layers.0.attention_norm.weight": layer.input_layernorm.weight,
        "layers.0.feed_forward.w1.weight": layer.mlp.gate_proj.weight,
        "layers.0.feed_forward.w2.weight": layer.mlp.down_proj.weight,
        "layers.0.feed_forward.w3.weight": layer.mlp.up_proj.weight,
        "layers.0.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "norm.weight": model.model.norm.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    assert {name for name in state if not name.startswith("layers.1.")} == set(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert ligo.verify(tmp_path / "titan", model).same
    # A checkpoint of torchtitan's own has its training state too, and the sizes in a config.json beside it.
    own = tmp_path / "outputs" / "step-7"
    dcp.save({**state, "train_state.step": torch.tensor(7)}, checkpoint_id=str(own), no_dist=True)
    model.config.save_pretrained(own.parent)
    assert ligo.verify(own, model).same and ligo.inspect(own)["format"] == "torchtitan"
    if tied:
        state["lm_head.weight"] = state["lm_head.weight"] + 1
        dcp.save(state, checkpoint_id=str(tmp_path / "outputs" / "untied"), no_dist=True)
        with pytest.raises(ligo.CheckpointError, match="tie_word_embeddings"):
            ligo.verify(own.parent / "untied", model)


def test_damage_is_refused(tmp_path):
    ligo.convert(hf_models.model(), tmp_path / "dcp", to="fsdp")
    (path,) = tmp_path.glob("dcp/__0_1.distcp")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ligo.CheckpointError):
        ligo.verify(tmp_path / "dcp", hf_models.model())
    path.unlink()
    with pytest.raises(ligo.CheckpointError, match="__0_1"):
        ligo.inspect(tmp_path / "dcp")


def test_names_of_another_family_are_refused(tmp_path):
    with pytest.raises(ligo.ConfigError, match="torchtitan"):
        ligo.convert(hf_models.model("qwen2"), tmp_path / "titan", to="torchtitan")
    assert not Path(tmp_path / "titan").exists()
