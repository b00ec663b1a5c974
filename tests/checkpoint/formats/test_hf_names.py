"""Hugging Face folders as people have them: torch files, one prefix on all names, base models, one of tied tensors."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from transformers import AutoModel, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint import hf_models
from tests.checkpoint.bad_checkpoints import torch_archives
from tests.checkpoint.config_perturbation import MODELS

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
# Prefixes that wrappers put before all names.
PREFIXES = ["module.", "_orig_mod.", "model.", "module._orig_mod.", "student.net."]


def folder_with(folder: Path, source: Path, state: dict, file: str = SAFETENSORS, **options) -> Path:
    """Writes the config of a folder beside other tensors."""
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    if file == SAFETENSORS:
        save_file({name: tensor.clone() for name, tensor in state.items()}, folder / file, {"format": "pt"})
    else:
        torch.save(state, folder / file, **options)
    return folder


def refusal(folder: Path) -> tuple:
    """Returns the problems of a folder that is refused in one line."""
    with pytest.raises(CheckpointError) as error:
        formats.open(folder)
    assert len(error.value.problems) == 1, str(error.value)
    return error.value.problems[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_torchs_files(tmp_path, tied, old):
    model, source = hf_models.saved(tmp_path / "a", tied=tied)
    state = model.state_dict()
    assert "lm_head.weight" in state
    options = {"_use_new_zipfile_serialization": not old}
    folder = folder_with(tmp_path / "b", source, state, TORCH, **options)
    hf_models.assert_same(formats.open(source), formats.open(folder))
    hf_models.assert_same(formats.open(source), formats.open(folder / TORCH))


def write_shards(folder: Path, state: dict) -> dict:
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[:9], names[9:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    return weight_map


def test_torchs_shards(tmp_path):
    model, source = hf_models.saved(tmp_path / "a")
    folder = folder_with(tmp_path / "b", source, {}, "unrelated.bin")
    weight_map = write_shards(folder, model.state_dict())
    index = folder / f"{TORCH}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    hf_models.assert_same(formats.open(source), formats.open(folder))
    (folder / TORCH).write_bytes(b"")
    assert refusal(folder).expected == f"either {TORCH} or shards with an index"
    (folder / TORCH).unlink()
    index.unlink()
    with pytest.raises(CheckpointError) as error:
        formats.open(folder, "hf")
    assert index.name in str(error.value)


def test_torchs_file_beside_safetensors_is_said_to_be_unread(tmp_path):
    model, source = hf_models.saved(tmp_path / "a")
    torch.save({name: tensor + 1 for name, tensor in model.state_dict().items()}, source / TORCH)
    reader = formats.open(source)
    assert TORCH in reader.unread[0]
    assert torch.equal(reader.read("final_norm"), model.model.norm.weight)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_not_ignored(tmp_path, name):
    """transformers would load another model from such a folder: the weights with the adapter."""
    _, source = hf_models.saved(tmp_path / "a")
    (source / name).write_text("{}")
    assert refusal(source).found == name


def test_two_names_on_the_same_numbers(tmp_path):
    """In an untied model only the head may be the embedding's tensor: the architecture can tie them."""
    model, source = hf_models.saved(tmp_path / "a")
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    formats.open(folder_with(tmp_path / "b", source, state, TORCH))
    query = "model.layers.{}.self_attn.q_proj.weight"
    state[query.format(1)] = state[query.format(0)]
    problem = refusal(folder_with(tmp_path / "c", source, state, TORCH))
    assert (problem.where, problem.found) == (query.format(1), f"those of {query.format(0)}")


@pytest.mark.parametrize(
    "value", [3, {"weight": torch.ones(2)}, torch.ones(2).to_sparse()], ids=["a number", "a dict", "sparse"]
)
def test_values_that_are_no_tensors(tmp_path, value):
    model, source = hf_models.saved(tmp_path / "a")
    state = {**model.state_dict(), "model.norm.weight": value}
    problem = refusal(folder_with(tmp_path / "b", source, state, TORCH))
    assert "model.norm.weight" in problem.where


def test_damage_of_torchs_file(tmp_path):
    model, source = hf_models.saved(tmp_path / "a")
    folder = folder_with(tmp_path / "b", source, {**torch_archives.good_state(), **model.state_dict()}, TORCH)
    torch_archives.a_bit_of_a_tensor(folder / TORCH)
    with pytest.raises(CheckpointError, match="no such tensor"):
        formats.open(folder)
    torch.save(model.state_dict(), folder / TORCH)
    content = bytearray((folder / TORCH).read_bytes())
    content[content.index(model.model.norm.weight.detach().numpy().tobytes())] ^= 1
    (folder / TORCH).write_bytes(content)
    reader = formats.open(folder)
    reader.read("embed")
    with pytest.raises(CheckpointError, match="checksum"):
        reader.read("final_norm")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tied", [False, True])
def test_one_prefix_on_all_names(tmp_path, caplog, prefix, tied):
    caplog.set_level(logging.INFO)
    _, source = hf_models.saved(tmp_path / "a", tied=tied)
    state = load_file(source / SAFETENSORS)
    folder = folder_with(tmp_path / "b", source, {prefix + name: tensor for name, tensor in state.items()})
    hf_models.assert_same(formats.open(source), formats.open(folder))
    assert f"without their prefix {prefix!r}" in caplog.text
    caplog.clear()
    formats.open(source)
    assert not caplog.text


@pytest.mark.parametrize("prefix", ["", "module."])
def test_base_models(tmp_path, prefix):
    for tied in (True, False):
        _, source = hf_models.saved(tmp_path / f"a{tied}", tied=tied)
        base = AutoModel.from_pretrained(source).state_dict()
        folder = folder_with(tmp_path / f"b{tied}", source, {prefix + name: tensor for name, tensor in base.items()})
        if tied:
            hf_models.assert_same(formats.open(source), formats.open(folder))
        else:
            problem = refusal(folder)
            assert (problem.where, problem.found) == ("lm_head.weight", "nothing: a base model alone")


@pytest.mark.parametrize(
    ("family", "head"),
    [("gpt2", "lm_head"), ("gpt_neox", "embed_out"), ("bert", "cls."), ("roberta", "lm_head"), ("vit", "classifier")],
)
def test_a_lost_head_is_no_base_model(tmp_path, caplog, family, head):
    """A class that has a head is not read without it in silence; a base model says so by its class, or has none."""
    caplog.set_level(logging.INFO)
    name, config = MODELS[family]
    model = getattr(transformers, name)(CONFIG_MAPPING[family](**{**config, "tie_word_embeddings": False}))
    model.save_pretrained(tmp_path / "a")
    state = load_file(tmp_path / "a" / SAFETENSORS)
    folder = folder_with(tmp_path / "b", tmp_path / "a", {n: t for n, t in state.items() if not n.startswith(head)})
    config = json.loads((folder / "config.json").read_text())
    assert refusal(folder).found == "nothing: a base model alone"
    for classes in (None, [AutoModel.from_config(model.config).__class__.__name__]):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": classes}))
        assert not formats.open(folder).model_config.has_head
        assert ("read as a base model" in caplog.text) == (classes is None)
        caplog.clear()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_either_of_two_tied_tensors(tmp_path, kind, prefix):
    """safetensors' save_model keeps one of the names that share a tensor."""
    if kind == "llama":
        model = hf_models.model(tied=True)
    elif kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=4, n_positions=32))
    else:
        sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = BertForMaskedLM(BertConfig(vocab_size=37, max_position_embeddings=32, **sizes))
    source = tmp_path / "a"
    model.save_pretrained(source)
    save_model(model, str(tmp_path / "kept.safetensors"))
    kept = load_file(tmp_path / "kept.safetensors")
    whole = model.state_dict()
    removed = {name: whole[name] for name in whole.keys() - kept.keys()}
    assert removed
    other = {name: t for name, t in whole.items() if not any(torch.equal(t, one) for one in removed.values())}
    for number, state in enumerate((kept, {**other, **removed})):
        folder = folder_with(tmp_path / f"b{number}", source, {prefix + name: t for name, t in state.items()})
        hf_models.assert_same(formats.open(source), formats.open(folder))
        assert not describe(formats.open(folder)).get("missing")


def test_a_head_alone_is_no_embedding_of_an_untied_model(tmp_path):
    _, source = hf_models.saved(tmp_path / "a")
    state = load_file(source / SAFETENSORS)
    del state["model.embed_tokens.weight"]
    assert refusal(folder_with(tmp_path / "b", source, state)).where == "model.embed_tokens.weight"


def test_names_of_another_model_are_refused_in_one_line(tmp_path):
    _, source = hf_models.saved(tmp_path / "a")
    state = load_file(source / SAFETENSORS)
    two = {f"{part}.{name}": tensor for part in ("student", "teacher") for name, tensor in state.items()}
    problem = refusal(folder_with(tmp_path / "b", source, two))
    assert "prefix 'teacher.'" in problem.found or "prefix 'student.'" in problem.found
    numbered = {f"tensor{number}": tensor for number, tensor in enumerate(state.values())}
    problem = refusal(folder_with(tmp_path / "c", source, numbered))
    assert "such as tensor0" in problem.found and "model.embed_tokens.weight" in problem.expected
