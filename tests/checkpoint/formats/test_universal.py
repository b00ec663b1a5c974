"""DeepSpeed universal checkpoints as files. test_pretrained.py loads them into real engines."""

from __future__ import annotations

import shutil

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint import hf_models

LAYER = "decoder.layers.1"


@pytest.fixture
def model_and_checkpoint(tmp_path):
    model, folder = hf_models.saved(tmp_path / "a", dtype=torch.bfloat16)
    convert(formats.open(folder), tmp_path / "b", "universal")
    return model, tmp_path / "b"


def load_parameter(folder, name, file="fp32.pt"):
    return torch.load(folder / "global_step0" / "zero" / name / file, weights_only=True)


def test_each_parameter_states_how_it_is_sharded(model_and_checkpoint):
    model, folder = model_and_checkpoint
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    metadata = {
        "embedding.word_embeddings.weight": {"cat_dim": 0, "vocab_tensor": True},
        f"{LAYER}.input_layernorm.weight": {},
        f"{LAYER}.self_attention.linear_qkv.weight": {"cat_dim": 0},
        f"{LAYER}.self_attention.linear_proj.weight": {"cat_dim": 1},
        f"{LAYER}.mlp.linear_fc1.weight": {"cat_dim": 0, "param_n_sub_params": 2},
        f"{LAYER}.mlp.linear_fc2.weight": {"cat_dim": 1},
        "decoder.final_layernorm.weight": {},
        "output_layer.weight": {"cat_dim": 0, "vocab_tensor": True},
    }
    for name, expected in metadata.items():
        saved = load_parameter(folder, name)
        tensor = saved.pop("param")
        assert saved == expected, name
        assert tensor.dtype == torch.float32
        for moment in ("exp_avg.pt", "exp_avg_sq.pt"):
            zeros = load_parameter(folder, name, moment)
            assert torch.equal(zeros.pop("param"), torch.zeros_like(tensor))
            assert zeros == expected
        assert load_parameter(folder, name, "step.pt") == 0
    q, k, v = (state[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    groups = [torch.cat([q[g * 30 : g * 30 + 30], k[g * 10 : g * 10 + 10], v[g * 10 : g * 10 + 10]]) for g in (0, 1)]
    assert torch.equal(load_parameter(folder, f"{LAYER}.self_attention.linear_qkv.weight")["param"], torch.cat(groups))


def test_settings_that_deepspeed_would_overwrite_are_left_out(model_and_checkpoint):
    _, folder = model_and_checkpoint
    state = torch.load(folder / "global_step0" / "zero" / "optimizer_state.pt", weights_only=True)
    assert state["param_groups"] == [{}] * 8
    assert "clip_grad" not in state


def test_write_options(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    extra = {"tag": "start", "moments": "none", "param_groups": 2}
    convert(formats.open(folder), tmp_path / "b", "universal", WriteOptions(extra=extra))
    assert (tmp_path / "b" / "latest_universal").read_text() == "start"
    assert not list((tmp_path / "b").rglob("exp_avg.pt"))
    assert not formats.open(tmp_path / "b").has_moments
    hf_models.assert_same(formats.open(tmp_path / "b"), formats.open(folder))


def test_tag_folder_with_flat_tensors_is_read(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "universal")
    tag = tmp_path / "b" / "global_step0"
    # DeepSpeed's converter writes flat tensors for ZeRO 3.
    for path in tag.glob("zero/*/fp32.pt"):
        torch.save(torch.load(path)["param"].flatten(), path)
    hf_models.assert_same(formats.open(tag), formats.open(folder))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_transformers(tmp_path, prefix):
    """DeepSpeed's converter writes them so for an engine that trained a model of transformers."""
    model, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "universal")
    zero = tmp_path / "b" / "global_step0" / "zero"
    for path in zero.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    for name, tensor in model.state_dict().items():
        (zero / (prefix + name)).mkdir()
        for number, file in enumerate(("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt")):
            torch.save({"param": tensor + number}, zero / (prefix + name) / file)
        torch.save(torch.tensor(5.0), zero / (prefix + name) / "step.pt")
    reader = formats.open(tmp_path / "b")
    hf_models.assert_same(reader, formats.open(folder))
    assert (reader.step, reader.has_moments) == (5, True)
    assert torch.equal(reader.read("final_norm", "exp_avg"), model.model.norm.weight + 1)
    shutil.rmtree(zero / f"{prefix}model.norm.weight")
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "b")
    assert [problem.where for problem in error.value.problems] == [f"{zero / 'model.norm.weight' / 'fp32.pt'}"]
