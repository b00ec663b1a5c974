"""Checkpoints of models with Transformer Engine's layers (emulated): the tables' names, read and resumed without it."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ligo.arch import architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.bench.bench_families import family_config
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.distributed import mesh as meshes
from megatron_ligo.models.full.factory import build_model
from megatron_ligo.models.mcore.attention import FusedAttention
from megatron_ligo.models.mcore.layer_spec import BuildOptions, build_layer_spec, is_supported
from tests.models.full import engine_cases, pretrain_cases
from tests.models.full.test_engine_checkpoints import check_deepspeeds_own_converter
from tests.tiny_models import llama_config
from tests.transformer_engine import Attention, emulated_transformer_engine

# Families whose layers Transformer Engine builds; it builds the last norm of most others.
FUSED = {"arcee", "deit", "ernie4_5", "gemma", "gpt2", "gpt_neox", "llama", "opt", "phi3", "smollm3", "stablelm"}
FUSED |= {"nemotron", "starcoder2", "vit"}


def state_dict_names(model_config: ModelConfig) -> list:
    """Returns, without and with Transformer Engine, the names of the parameters and of the state dict, whether the
    model loads the state dict of the one without, and the loss and the gradients' norm of the same weights."""
    mesh, result, state = meshes.build_mesh(1, 1), [], None
    seen, labels = pretrain_cases.inputs_and_labels(model_config, 0, 2)
    for installed in (False, True):
        with emulated_transformer_engine(installed):
            torch.manual_seed(3)
            model = build_model(model_config, BuildOptions(), mesh)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        state = state or {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(state)
        same = all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        loss = model(seen, labels, torch.ones(labels.shape))
        loss.backward()
        norms = [float(parameter.grad.norm()) for parameter in model.parameters() if parameter.grad is not None]
        names = [name for name, _ in model.named_parameters()]
        result.append([names, list(model.state_dict()), same, loss.item(), math.hypot(*norms)])
    return result


def state_dicts_of_families() -> dict[str, list]:
    return {name: state_dict_names(family_config(name)) for name, arch in architectures().items() if is_supported(arch)}


def test_every_family_has_the_names_of_the_tables(pools):
    families = pools(1).run(state_dicts_of_families)
    for family, (plain, fused) in families.items():
        assert set(fused[0]) == set(plain[0]) == set(plain[1]) == set(fused[1]), family
        assert plain[2] and fused[2], family
        assert fused[3:] == pytest.approx(plain[3:], rel=1e-6), family
    # The emulation registers norms in another order.
    assert {family for family, (plain, fused) in families.items() if fused[0] != plain[0]} == FUSED


def saved_and_resumed(folder: str, model_config: ModelConfig, layouts: list[dict]) -> dict:
    """The case of engine_cases with Transformer Engine; `moved`: engines that load what the other kind has saved."""
    with emulated_transformer_engine():
        result = engine_cases.saved_and_resumed(folder, model_config, layouts)
    result["moved"] = []
    for installed in (False, True):
        with emulated_transformer_engine(installed):
            job = engine_cases.Job(model_config, layouts[0], seed=11)
        path, _ = job.engine.engine.load_checkpoint(f"{folder}/engine", tag="state")
        assert path is not None
        result["moved"].append(job.losses(engine_cases.BEFORE, engine_cases.AFTER))
        job.end()
    with emulated_transformer_engine(False):
        job = engine_cases.Job(model_config, layouts[1], source=formats.open(f"{folder}/universal"))
        result["without"] = job.losses(engine_cases.BEFORE, engine_cases.AFTER)
        job.end()
    return result


LONG = pytest.mark.long
# GPT-2 has biases beside its norms, so that the parameters' order matters.
LAYOUTS = [
    ("gpt2", [{"tp": 2}, {"zero": 3}]),
    pytest.param("llama", [{"zero": 2}, {"pp": 2}], marks=LONG),
    pytest.param("gpt2", [{"pp": 2}, {"tp": 2}], marks=LONG),
    pytest.param("gpt2", [{"tp": 2, "sequence_parallel": True}, {"cp": 2}], marks=LONG),
    pytest.param("qwen3", [{"tp": 2, "pp": 2}, {"tp": 2, "zero": 3}], marks=LONG),
    pytest.param("gemma", [{"tp": 2, "cp": 2}, {"pp": 2, "tp": 2}], marks=LONG),
]


@pytest.mark.parametrize("family, layouts", LAYOUTS, ids=str)
def test_checkpoints_do_not_depend_on_the_layers(pools, tmp_path, family, layouts):
    model_config = pretrain_cases.sizes(False, family)
    ranks = max(math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp")) for layout in layouts)
    result = pools(max(2, ranks)).run(
        saved_and_resumed, folder=str(tmp_path), model_config=model_config, layouts=layouts
    )
    for losses in [*result["resumed"], *result["moved"], result["without"]]:
        assert losses == pytest.approx(result["undisturbed"], rel=1e-5)
    check_deepspeeds_own_converter(tmp_path)
    engine = formats.open(tmp_path / "engine")
    assert not describe(engine)["unread"]
    convert(engine, tmp_path / "hf", "hf")


def test_only_16_bits_take_its_attention():
    with emulated_transformer_engine():
        kinds = [
            build_layer_spec(llama_config(), dtype).submodules.self_attention.submodules.core_attention
            for dtype in (torch.float32, torch.bfloat16)
        ]
    assert kinds == [FusedAttention, Attention]
