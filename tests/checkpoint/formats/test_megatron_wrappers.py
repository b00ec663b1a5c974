"""Megatron-core's models saved under wrapped names: by NeMo's strategy, and by torch.distributed.checkpoint alone."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import yaml
from megatron.core import dist_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import megatron_ligo as ligo
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.distributed import mesh as meshes
from tests.checkpoint import hf_models
from tests.checkpoint.formats import megatron_optimizers, megatron_ranks
from tests.checkpoint.formats.test_megatron import assert_same_weights, assert_stepped
from tests.checkpoint.source_keys.test_run_config import fields

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 53}


def save_as_nemo(folder: str, path: str) -> None:
    """Saves a bf16 model and its optimizer after a step, with PyTorch Lightning's state, as NeMo 2 does."""
    multiprocessing.current_process()._config["daemon"] = False
    source, mesh = formats.open(path), meshes.build_mesh(1, 2)
    model = megatron_ranks.build_gpt(source.model_config, mesh, torch.bfloat16)
    megatron_ranks.fill_weights(model, source, mesh)
    optimizer = megatron_optimizers.build_adamw(model, True, True)
    for part in optimizer.chained_optimizers:
        megatron_optimizers.step_with(part, megatron_optimizers.gradient)
    Path(folder).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    metadata = megatron_ranks.sharding_metadata(
        distrib_optim_sharding_type="fully_reshardable", chained_optim_avoid_prefix=True
    )
    weights = model.sharded_state_dict(prefix="module.", metadata=metadata)
    state = {
        "epoch": 0,
        "global_step": 5,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {},
        "loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 1, "completed": 0}}}},
        "lr_schedulers": [],
        "sharded_state_dict": weights,
        "optimizer": [optimizer.sharded_state_dict(weights, metadata=metadata)],
    }
    dist_checkpointing.save(state, folder)


def save_with_torch(folder: str, path: str, wrapper: str, splits: bool) -> None:
    """Saves DTensors of a GPTModel's parameters, cut along their rows, as Megatron-LM's torch_dcp and fsdp_dtensor do.

    wrapper: the beginning of the model's names. splits: of gate and up, into two tensors, with a state of the optimizer
    and chunks as Megatron-FSDP prepares them.
    """
    source, mesh = formats.open(path), meshes.build_mesh(1, 1)
    model = megatron_ranks.build_gpt(source.model_config, mesh)
    megatron_ranks.fill_weights(model, source, mesh)
    ranks = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if splits:
        for name in [name for name in tensors if name.endswith("linear_fc1.weight")]:
            tensors[f"{name}_w"], tensors[f"{name}_v"] = (half.contiguous() for half in tensors.pop(name).chunk(2))
    weights = {f"{wrapper}{name}": distribute_tensor(tensor, ranks, [Shard(0)]) for name, tensor in tensors.items()}
    state = {
        "model": weights,
        "args": megatron_ranks.build_run_args(source.model_config, 1, 1),
        "iteration": 5,
        "checkpoint_version": 3.0,
    }
    if splits:
        from megatron.core.distributed.fsdp.src.megatron_fsdp.uneven_dtensor import (
            preprocess_state_dict_for_uneven_dtensor,
        )

        state["optimizer"] = {"state": {name: {"exp_avg": tensor.clone()} for name, tensor in weights.items()}}
        preprocess_state_dict_for_uneven_dtensor(state)
    dcp.save(state, checkpoint_id=folder)


@pytest.fixture
def nemo(pools, tmp_path):
    """A checkpoint with the fields of its model but the size of the vocabulary, a tokenizer's file, and its source."""
    _, source = hf_models.saved(tmp_path / "hf", dtype=torch.bfloat16, **SIZES)
    folder = tmp_path / "model--step=5-last"
    pools(2).run(save_as_nemo, folder=str(folder / "weights"), path=str(source))
    (folder / "context" / "nemo_tokenizer").mkdir(parents=True)
    (folder / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "context" / "io.json").write_text("{}")
    base = "nemo.collections.llm.gpt.model."
    config = {**fields(source), "_target_": f"{base}llama.Llama3Config8B", "vocab_size": None}
    config["transformer_layer_spec"] = {"_target_": f"{base}base.default_layer_spec", "_call_": False}
    model = {"_target_": f"{base}llama.LlamaModel", "config": config}
    (folder / "context" / "model.yaml").write_text(yaml.safe_dump(model))
    return folder, source


def test_nemos_checkpoint_is_read_from_its_own_folder(nemo, tmp_path):
    """Weights, master weights, moments and step; the vocabulary is the padded one, as no file says another."""
    folder, path = nemo
    source, padded = formats.open(path), megatron_ranks.PADDED_VOCAB_SIZE
    for place in (folder, folder / "weights"):
        reader = formats.open(place)
        assert (reader.format, reader.model_config.vocab_size) == ("mcore", padded)
        assert [file.name for file in reader.files] == ["tokenizer.json"]
    # Hugging Face's config.json beside the two folders states the vocabulary's own size.
    shutil.copy(path / "config.json", folder)
    reader = formats.open(folder)
    assert reader.model_config == source.model_config and reader.has_moments
    # One step of Adam, by its own count.
    assert (reader.step, reader.unread) == (1, ())
    assert_stepped(reader, source, weights=True)
    convert(reader, tmp_path / "out", "hf")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_nemos_checkpoint_without_an_optimizer_has_lightnings_step(nemo):
    folder, _ = nemo
    common = folder / "weights" / "common.pt"
    # NeMo's Megatron-core writes this file; a newer one writes an object among the tensors.
    state = dist_checkpointing.load_common_state_dict(str(common.parent))
    del state["optimizer"]
    torch.save(state, common)
    metadata = folder / "weights" / ".metadata"
    metadata.write_bytes(metadata.read_bytes().replace(b"optimizer.state.exp_avg.", b"optimizer.state.exp_xxx."))
    reader = formats.open(folder)
    assert (reader.step, reader.has_moments) == (5, False)


@pytest.mark.parametrize(
    ("wrapper", "splits", "model_type"),
    [("", False, "llama"), ("module.", True, "llama"), ("module.module.", True, "qwen2")],
    ids=["torch_dcp", "fsdp_dtensor", "biases"],
)
def test_what_torch_distributed_saves_of_a_megatron_model_is_read(pools, tmp_path, wrapper, splits, model_type):
    _, path = hf_models.saved(tmp_path / "hf", model_type, **SIZES)
    folder = tmp_path / "run" / "iter_0000005"
    job = {"path": str(path), "wrapper": wrapper, "splits": splits}
    pools(2).run(save_with_torch, folder=str(folder), **job)
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("5")
    source = formats.open(path)
    for place in (folder, folder.parent):
        reader = formats.open(place)
        assert (reader.format, reader.step, reader.has_moments) == ("mcore", 5, False)
        assert reader.model_config == source.model_config
        assert bool(reader.unread) is splits
        assert_same_weights(reader, source)
    # Without the folder of a run, its names tell what it is.
    shutil.copytree(folder, tmp_path / "alone")
    assert ligo.inspect(tmp_path / "alone")["format"] == "mcore"


def test_names_with_and_without_a_wrapper_are_refused(tmp_path):
    tensors = {"decoder.layers.0.self_attention.linear_qkv.weight": torch.ones(2)}
    state = {**tensors, "model": {f"module.{name}": tensor for name, tensor in tensors.items()}}
    dcp.save(state, checkpoint_id=str(tmp_path / "two"), no_dist=True)
    with pytest.raises(ligo.CheckpointError, match="prefix"):
        ligo.inspect(tmp_path / "two")
