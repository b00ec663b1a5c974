"""Keys of DeepSpeed's model-states files: its config, a script's client state, Megatron-DeepSpeed's arguments."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.deepspeed import state_keys
from megatron_ligo.checkpoint.manifest import load_manifest
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint import hf_models

FORMATS = ("deepspeed", "pipeline", "universal")
# What DeepSpeed 0.19.8, HF Trainer and Megatron-DeepSpeed leave there.
USUAL = {
    "buffer_names": ["rotary.inv_freq"],
    "lr_scheduler": {"last_epoch": 3},
    "ds_version": "0.19.8",
    "iteration": 3,
    "checkpoint_version": 3.0,
    "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    "rng_state": [{"random_rng_state": (3, 4)}],
    "ds_config": {
        "train_batch_size": 8,
        "zero_optimization": {"stage": 1, "mics_shard_size": -1, "overlap_comm": True},
        "bf16": {"enabled": True},
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}, "rounding": "near"}},
        "tensor_parallel": {"autotp_size": 1},
        "wandb": {"enabled": True, "team": "me"},
    },
}
ARGS = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "kv_channels": 10,
    "normalization": "rmsnorm",
    "swiglu": True,
    "add_bias_linear": False,
    "use_rotary_position_embeddings": True,
    "rope_theta": 5000,
    "rotary_percent": 1.0,
    "layernorm_epsilon": 1e-3,
    "num_experts": [1],
    "mlp_type": "standard",
    "untie_embeddings_and_output_weights": True,
    "deepspeed_config": "ds.json",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    _, folder = hf_models.saved(root / "hf")
    for to in FORMATS:
        convert(formats.open(folder), root / to, to)
    return root


def edited(written: Path, folder: Path, to: str, state: dict) -> Path:
    """Copies a checkpoint with more keys in its model states."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written / to, folder)
    for path in folder.rglob("*mp_rank_00_model_states.pt"):
        torch.save({**torch.load(path, weights_only=False), **state}, path)
    return folder


def refusals(folder: Path) -> list[str]:
    try:
        formats.open(folder)
    except CheckpointError as error:
        return [problem.where.rpartition(": ")[2] for problem in error.problems]
    return []


@pytest.mark.parametrize("to", FORMATS)
def test_usual_keys_are_understood(written, tmp_path, to):
    state = {**USUAL, "args": argparse.Namespace(**ARGS)}
    reader = formats.open(edited(written, tmp_path / "x", to, state))
    hf_models.assert_same(formats.open(written / "hf"), reader)


@pytest.mark.parametrize("to", FORMATS)
def test_configs_that_change_the_model_are_refused(written, tmp_path, to):
    cases = {
        "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
        "quantize_training": {"enabled": True},
        "weight_quantization": {"quantized_initialization": {"num_bits": 4}},
        "sparse_attention": {"mode": "fixed"},
        "tensor_parallel": {"autotp_size": 2},
        "expert_parallel": {"enabled": True},
        "new_feature": {"enabled": True},
    }
    for name, value in cases.items():
        assert refusals(edited(written, tmp_path / "x", to, {"ds_config": {name: value}})) == [name]
    zero = {"mics_shard_size": 4, "zero_quantized_nontrainable_weights": True, "zenflow": {"topk_ratio": 0.1}}
    for name, value in {**zero, "stage4": True}.items():
        state = {"ds_config": {"zero_optimization": {name: value}}}
        assert refusals(edited(written, tmp_path / "x", to, state)) == [name]
    assert refusals(edited(written, tmp_path / "x", to, {"num_experts": [8]})) == ["num_experts"]


class Recorder(dict):
    """A config that remembers which keys it was asked for."""

    asked: ClassVar[set] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def test_every_key_that_deepspeed_reads_is_classified(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    DeepSpeedConfig(Recorder(train_batch_size=1))
    assert len(Recorder.asked) > 40
    assert not {key for key in Recorder.asked if key not in state_keys.CONFIG and key not in state_keys.SWITCHES}
    fields = DeepSpeedZeroConfig.model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert not {name for name in names if name not in state_keys.ZERO_TABLE}


@pytest.mark.parametrize("to", FORMATS)
def test_arguments_of_megatron_deepspeed_are_checked(written, tmp_path, to):
    """Beside the config that these formats always need."""
    for changes, where in (
        ({"num_layers": 3}, "num_layers"),
        ({"num_key_value_heads": 6}, "num_kv_heads"),
        ({"rope_theta": 10000}, "rope_base"),
        ({"normalization": "layernorm"}, "normalization"),
        ({"num_experts": [8]}, "num_experts"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"embed_layernorm": True}, "embed_layernorm"),
    ):
        for args in (argparse.Namespace(**{**ARGS, **changes}), {**ARGS, **changes}):
            assert refusals(edited(written, tmp_path / "x", to, {"args": args})) == [where]


def test_an_unknown_client_state_may_be_accepted(written, tmp_path):
    folder = edited(written, tmp_path / "x", "deepspeed", {"my_adapter": {"rank": 8}, "best": None})
    assert refusals(folder) == ["my_adapter"]
    convert(formats.open(folder, accept=["my_adapter"]), tmp_path / "out", "hf")
    assert load_manifest(tmp_path / "out").accepted == {"my_adapter": "{'rank': 8}"}
