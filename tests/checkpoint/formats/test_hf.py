"""Hugging Face folders against the real transformers classes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import megatron_ligo as ligo
from megatron_ligo.checkpoint import formats, inspect
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.io.output import Output
from megatron_ligo.checkpoint.verify import compare
from megatron_ligo.common import folder_kinds
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.growth.validation import build_initial_operator
from tests.checkpoint import hf_models
from tests.tiny_models import hf_llama, llama_config, memory_of

SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "linear": {"factor": 2.0},
}


def rewrite(source, folder, **extra):
    folder.mkdir()
    with Output(folder) as out:
        formats.get("hf").write(source, out, WriteOptions(extra=extra))
    return folder


@pytest.mark.parametrize("model_type", list(hf_models.CLASSES))
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_there_and_back(tmp_path, model_type, tied, dtype):
    model, folder = hf_models.saved(tmp_path / "a", model_type, tied=tied, dtype=dtype)
    source = formats.open(folder)
    state = model.state_dict()
    assert source.model_config.tied == tied
    assert source.model_config.qkv_bias == (model_type == "qwen2")
    assert hf_models.same_bits(source.read("layers.1.k"), state["model.layers.1.self_attn.k_proj.weight"])
    written = rewrite(source, tmp_path / "b", shard_bytes=9000)
    assert len(list(written.glob("model-*.safetensors"))) > 2
    hf_models.assert_same(source, formats.open(written))
    again = AutoModelForCausalLM.from_pretrained(written, dtype="auto").eval()
    assert type(again) is type(model)
    assert again.dtype == dtype
    ids = hf_models.tokens()
    # Loaded, too: a model cast in memory has cast its rotary frequencies with it.
    first = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(first(ids).logits, again(ids).logits)


def test_one_file_equals_the_librarys(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    written = rewrite(formats.open(folder), tmp_path / "b")
    ours, theirs = load_file(written / "model.safetensors"), load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", [None, *SCALED])
def test_rope_in_both_forms_of_the_config(tmp_path, kind):
    rope = {"rope_type": kind, **SCALED[kind]} if kind else None
    model, folder = hf_models.saved(tmp_path / "a", "llama", rope_scaling=rope)
    source = formats.open(folder)
    assert source.model_config.rope_base == 5000.0
    assert (source.model_config.rope_scaling or {}).get("rope_type") == kind
    old = json.loads((rewrite(source, tmp_path / "b") / "config.json").read_text())
    assert "rope_parameters" not in old
    rest = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new = rest | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, **(rope or {})}}
    # The first wins as a whole in transformers.
    both = old | {"rope_parameters": {"rope_type": "linear", "factor": 7.0, "rope_theta": 9.0}} if rope else new
    for number, config in enumerate((old, new, both)):
        assert config_json.parse_model_config(config, "config") == source.model_config
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(tmp_path / f"{number}")
        assert read.rope_parameters == model.config.rope_parameters


def test_missing_config_keys_have_transformers_defaults(tmp_path):
    _, folder = hf_models.saved(
        tmp_path / "a", head_dim=8, num_key_value_heads=6, rms_norm_eps=1e-6, rope_theta=10000.0
    )
    path = folder / "config.json"
    config = json.loads(path.read_text())
    full = formats.open(folder).model_config
    for name in ("head_dim", "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):
        del config[name]
    path.write_text(json.dumps(config))
    assert formats.open(folder).model_config == full


def test_token_ids_and_files_are_copied(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not the model's")
    written = rewrite(formats.open(folder), tmp_path / "b")
    config = json.loads((written / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (3, 5)
    assert {file.name for file in written.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_a_stored_tied_head_must_equal_its_embedding(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a", tied=True)
    path = folder / "model.safetensors"
    state = load_file(path)
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, path, {"format": "pt"})
    reader = formats.open(folder)
    assert "head" not in list(reader.keys())
    reader.read("embed")
    state["lm_head.weight"][0, 0] += 1
    save_file(state, path, {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        formats.open(folder).read("embed")
    assert error.value.problems[0].where == f"{folder}: lm_head.weight"


def test_a_cache_with_links_to_blobs_is_read(tmp_path):
    _, folder = hf_models.saved(tmp_path / "plain")
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    blobs = tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    hf_models.assert_same(formats.open(folder), formats.open(snapshot))


@pytest.mark.parametrize("format_name", ["hf", "deepspeed", "mcore"])
def test_no_link_leads_out_of_a_checkpoint(tmp_path, format_name):
    """Otherwise the author of a folder chooses which file of this machine is read. Links inside it are allowed."""
    _, whole = hf_models.saved(tmp_path / "whole")
    good = tmp_path / "good"
    convert(formats.open(whole), good, format_name)
    ending = {"hf": "*.safetensors", "deepspeed": "*states.pt", "mcore": "__0_1.distcp"}[format_name]
    (weights,) = good.rglob(ending)
    moved = good / "elsewhere"
    weights.rename(moved)
    weights.symlink_to(moved)
    hf_models.assert_same(formats.open(whole), formats.open(good))
    weights.unlink()
    weights.symlink_to(moved.rename(tmp_path / "outside"))
    with pytest.raises(CheckpointError) as error:
        formats.open(good)
    (problem,) = error.value.problems
    assert (problem.where, problem.found) == (f"{weights.relative_to(good)}", f"a link to {tmp_path / 'outside'}")


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    save_file(state, path, {"format": "pt"})
    formats.open(folder)


@pytest.mark.parametrize(("model_type", "heads", "warns"), [("llama", 6, 1), ("llama", 8, 0), ("qwen2", 6, 0)])
def test_sizes_that_transformers_refuses_are_written_with_a_warning(tmp_path, caplog, model_type, heads, warns):
    """Other readers load them."""
    small = llama_config(model_type=model_type, qkv_bias=model_type == "qwen2", num_kv_heads=2)
    large = LargeSection(hidden_size=32, num_heads=heads)
    source = GrownReader(build_initial_operator(small, large, OperatorSection()), memory_of(hf_llama(small), small))
    convert(source, tmp_path / "out", "hf")
    warnings = [entry.getMessage() for entry in caplog.records if "hf: num_heads" in entry.getMessage()]
    assert len(warnings) == warns and all("hidden_size = 32" in line and "found 6" in line for line in warnings)
    assert formats.open(tmp_path / "out").model_config == source.model_config
    if warns:
        with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_optimizer_of_a_trainer_is_named_as_left_behind(tmp_path):
    _, folder = hf_models.saved(tmp_path / "checkpoint-2")
    assert formats.open(folder).unread == ()
    for name in ("optimizer.pt", "optimizer.bin"):
        torch.save({}, folder / name)
        unread = formats.open(folder).unread
        (folder / name).unlink()
        assert unread == (f"optimizer state ({name}: in the trainer's own form)",)
    for name in ("optimizer_0", "pytorch_model_fsdp_0"):
        (folder / name).mkdir()
    unread = formats.open(folder).unread
    assert unread[0].startswith("pytorch_model_fsdp_0 (sharded weights") and unread[1].startswith(
        "optimizer state (opt"
    )


def test_weights_without_a_config_are_told_what_they_lack(tmp_path):
    """What Accelerate's save_state writes."""
    _, folder = hf_models.saved(tmp_path / "state")
    (folder / "config.json").unlink()
    torch.save({}, folder / "optimizer.bin")
    with pytest.raises(
        CheckpointError, match=r"config\.json: expected the checkpoint's config.*save_pretrained"
    ) as error:
        formats.open(folder)
    assert len(error.value.problems) == 1


@pytest.mark.parametrize("config", [True, False])
def test_the_whole_weights_that_accelerate_saves_are_read(tmp_path, config):
    """With FSDP and FULL_STATE_DICT: a state dict of torch.save, and no config.json."""
    model, folder = hf_models.saved(tmp_path / "state")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model_fsdp.bin")
    torch.save({}, folder / "optimizer.bin")
    if not config:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json: expected the checkpoint's config.*save_pretrained"):
            formats.open(folder)
        return
    assert compare(formats.open(folder), ligo.open_state_dict(model.state_dict(), model.config)).same
    assert folder_kinds.identify(folder) is folder_kinds.MODEL
    model.save_pretrained(folder)
    both = "pytorch_model_fsdp.bin or its shards (model.safetensors or its shards beside it are read)"
    assert formats.open(folder).unread[0] == both


def test_the_step_is_that_of_the_trainers_record(tmp_path):
    """It is printed. No conversion carries it, and no digest depends on it."""
    _, folder = hf_models.saved(tmp_path / "checkpoint-2")
    record = folder / "trainer_state.json"
    for text, step in {
        '{"global_step": 2, "loss": NaN}': 2, '{"global_step": "2"}': 0, '{"global_step": true}': 0, "[]": 0, "{": 0,
        '{"global_step": -2}': 0,
    }.items():  # fmt: skip
        record.write_text(text)
        summary = inspect.describe(formats.open(folder))
        assert (summary["step"], formats.open(folder).step) == (step, 0)
        printed = f"step {step}, " if step else ""
        first_line = inspect.to_text(summary).splitlines()[0]
        assert first_line == f"{folder}: hf, one piece, {printed}without optimizer state"
