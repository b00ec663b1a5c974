"""Run arguments of Megatron-LM: which of them are understood, alone and beside a config."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.megatron_lm import argument_keys, expert_arguments
from megatron_ligo.checkpoint.manifest import load_manifest
from megatron_ligo.common.errors import CheckpointError, ConfigError
from tests import layer_norm_models
from tests.checkpoint import hf_models
from tests.checkpoint.source_keys import megatron_perturbation

FILES = {"mcore": "common.pt", "megatron": "mp_rank_00/model_optim_rng.pt"}
# Arguments that change what a Llama computes and leave no tensor, or arguments of other networks.
CHANGES = {
    "activation_func": "torch.nn.functional.gelu",
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": True,
    "apply_layernorm_1p": True,
    "apply_residual_connection_post_layernorm": True,
    "attention_output_gate": True,
    "experimental_attention_variant": "gated_delta_net",
    "glu_linear_offset": 1.0,
    "heterogeneous_layers_config_path": "/models/blocks.json",
    "hybrid_override_pattern": "M*-",
    "is_hybrid_model": True,
    "layernorm_zero_centered_gamma": True,
    "linear_attention_freq": 4,
    "mtp_num_layers": 1,
    "multi_latent_attention": True,
    "no_rope_freq": [0, 1],
    "normalization": "LayerNorm",
    "openai_gelu": True,
    "position_embedding_type": "none",
    "qk_l2_norm": True,
    "qk_layernorm": True,
    "quick_geglu": True,
    "retro_add_retriever": True,
    "rotary_interleaved": True,
    "rotary_percent": 0.5,
    "rotary_seq_len_interpolation_factor": 4,
    "softmax_scale": 0.5,
    "softmax_type": "off-by-one",
    "spec": ["my.layers", "spec"],
    "squared_relu": True,
    "swiglu": False,
    "transformer_impl": "mine",
    "use_mup": True,
    "window_size": (-1, -1),
    "yaml_cfg": "model.yaml",
}
# Sizes that differ from those of hf_models.
SIZES = {
    "num_layers": (3, "num_layers"),
    "hidden_size": (96, "hidden_size"),
    "ffn_hidden_size": (64, "ffn_size"),
    "num_attention_heads": (12, "num_heads"),
    "num_query_groups": (6, "num_kv_heads"),
    "kv_channels": (8, "head_dim"),
    "vocab_size": (36, "vocab_size"),
    "max_position_embeddings": (128, "max_positions"),
    "norm_epsilon": (1e-5, "norm_eps"),
    "untie_embeddings_and_output_weights": (False, "tied"),
    "add_qkv_bias": (True, "qkv_bias"),
    "rotary_base": (10_000, "rope_base"),
    "window_size": ((15, 0), "sliding_window"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A Llama as hf, mcore and megatron, without anything but the arguments that states its sizes."""
    root = tmp_path_factory.mktemp("llama")
    _, folder = hf_models.saved(root / "hf")
    for to in FILES:
        convert(formats.open(folder), root / to, to)
        (root / to / "dims.json").unlink()
    return root


def edited(written: Path, folder: Path, to: str, beside: str = "", drop: tuple[str, ...] = (), **changes) -> Path:
    """Copies a checkpoint with other arguments. beside: "config.json" puts the model's config beside the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(written / to, folder)
    path = folder / "release" / FILES[to]
    state = torch.load(path, weights_only=False)
    for name in drop:
        delattr(state["args"], name)
    vars(state["args"]).update(changes)
    torch.save(state, path)
    if beside == "config.json":
        shutil.copy(written / "hf" / "config.json", folder)
    return folder


def refusals(folder: Path, accept: tuple[str, ...] = ()) -> list[str]:
    """Returns where an opened checkpoint is refused; [] if it is not."""
    try:
        formats.open(folder, accept=accept)
    except CheckpointError as error:
        return [problem.where.rpartition(": ")[2] for problem in error.problems]
    return []


def test_every_setting_of_megatron_core_is_classified():
    """So that an upgrade fails here, and no new setting is ignored."""
    known = {*argument_keys.FIELDS, *argument_keys.HARMLESS, *argument_keys.FIXED, *argument_keys.QUANTIZATION}
    names = {field.name for config in (TransformerConfig, MLATransformerConfig) for field in dataclasses.fields(config)}
    names |= set(inspect.signature(GPTModel.__init__).parameters) - {"self", "config"}
    assert names - known == set()


def test_every_argument_of_experts_is_classified():
    """What is harmless in a dense model is not so in one with experts."""
    reason = argument_keys.HARMLESS["moe_router_score_function"]
    of_experts = {name for name, why in argument_keys.HARMLESS.items() if why == reason} | {"moe_router_topk"}
    assert of_experts == {name for name in of_experts if name in expert_arguments.TABLE}
    assert len(of_experts) == sum(map(len, (expert_arguments.TABLE.fields, expert_arguments.TABLE.harmless,
                                            expert_arguments.TABLE.fixed)))  # fmt: skip


def test_quantized_training_may_be_accepted_by_name():
    assert not any(name in argument_keys.TABLE for name in argument_keys.QUANTIZATION)


@pytest.mark.parametrize("to", FILES)
@pytest.mark.parametrize("beside", ["", "config.json"])
def test_arguments_that_change_the_function_are_refused(written, tmp_path, to, beside):
    """Alone, and with the config.json beside that the errors advise: never accepted by name either."""
    assert refusals(edited(written, tmp_path / "x", to, beside)) == []
    wrong = {}
    for name, value in CHANGES.items():
        if name in ("rotary_seq_len_interpolation_factor", "qk_layernorm") and not beside:
            continue
        more = {"transformer_impl": "local"} if name == "window_size" else {}
        where = refusals(edited(written, tmp_path / "x", to, beside, **more, **{name: value}), accept=(name,))
        expected = {"rotary_seq_len_interpolation_factor": "rope_scaling"}
        expected |= {"rotary_percent": "rotary_fraction", "no_rope_freq": "rope_layers"} if beside else {}
        if where != [name] and where != [expected.get(name)]:
            wrong[name] = where
    assert wrong == {}


@pytest.mark.parametrize("to", FILES)
def test_sizes_beside_a_config_agree(written, tmp_path, to):
    wrong = {}
    for name, (value, field) in SIZES.items():
        where = refusals(edited(written, tmp_path / "x", to, "config.json", **{name: value}))
        if field not in where:
            wrong[name] = where
    assert wrong == {}


def test_unknown_arguments(written, tmp_path):
    """Pass while they are empty, or if the user lets them through: then the manifest of a conversion records them."""
    for value in (None, False, 0, "", [], {}):
        assert refusals(edited(written, tmp_path / "x", "mcore", new_attention=value)) == []
    for beside in ("", "config.json"):
        folder = edited(written, tmp_path / "x", "mcore", beside, new_attention="ring", fp8="hybrid")
        assert refusals(folder) == ["new_attention", "fp8"]
        convert(formats.open(folder, accept=("new_attention", "fp8")), tmp_path / "out", "hf")
        assert load_manifest(tmp_path / "out").accepted == {"new_attention": "'ring'", "fp8": "'hybrid'"}
        shutil.rmtree(tmp_path / "out")
    with pytest.raises(ConfigError):
        formats.open(edited(written, tmp_path / "x", "mcore"), accept=("new_attention",))


def test_names_of_other_versions(written, tmp_path):
    """Megatron-LM 0.16 and later keep the names of TransformerConfig; old versions have no type of positions."""
    source = formats.open(written / "hf").model_config
    old = ("norm_epsilon", "apply_layernorm_1p")
    new = {"layernorm_epsilon": source.norm_eps, "layernorm_zero_centered_gamma": False}
    assert formats.open(edited(written, tmp_path / "x", "megatron", drop=old, **new)).model_config == source
    drop, rotary = ("position_embedding_type",), {"use_rotary_position_embeddings": True}
    assert formats.open(edited(written, tmp_path / "x", "megatron", drop=drop, **rotary)).model_config == source
    where = refusals(edited(written, tmp_path / "x", "megatron", drop=drop))
    assert where == ["use_rotary_position_embeddings"]
    assert refusals(edited(written, tmp_path / "x", "megatron", layernorm_epsilon=1e-6)) == ["layernorm_epsilon"]


@pytest.mark.parametrize("window, more, expected", [
    (None, {}, None),
    ((-1, -1), {"transformer_impl": "transformer_engine"}, None),
    ((7, 0), {}, 8),
    ([0, 0], {}, 1),
    ((7, 0), {"window_attn_skip_freq": [1, 1]}, 8),
])  # fmt: skip
def test_windows(written, tmp_path, window, more, expected):
    folder = edited(written, tmp_path / "x", "mcore", window_size=window, **more)
    assert formats.open(folder).model_config.sliding_window == expected


def test_arguments_without_a_window_beside_a_config_with_one(written, tmp_path):
    """The version that saved them may know no windows: it attended to everything."""
    _, mistral = hf_models.saved(tmp_path / "hf", "mistral", sliding_window=8)
    convert(formats.open(mistral), tmp_path / "mcore", "mcore")
    assert formats.open(edited(tmp_path, tmp_path / "x", "mcore")).model_config.sliding_window == 8
    shutil.copy(mistral / "config.json", tmp_path / "mcore")
    assert refusals(edited(tmp_path, tmp_path / "x", "mcore", drop=("window_size",))) == ["sliding_window"]


@pytest.mark.parametrize("changes", [
    {"window_size": (7, 7)}, {"window_size": (-2, 0)}, {"window_size": 7}, {"window_size": (7.5, 0)},
    {"window_size": (7, 0), "window_attn_skip_freq": 2}, {"window_size": (7, 0), "window_attn_skip_freq": [1, 0]},
])  # fmt: skip
def test_windows_that_no_family_has(written, tmp_path, changes):
    assert refusals(edited(written, tmp_path / "x", "mcore", **changes)) == [list(changes)[-1]]


def test_missing_and_malformed_arguments(written, tmp_path):
    for name in ("hidden_size", "normalization", "swiglu", "rotary_base", "untie_embeddings_and_output_weights"):
        (where,) = refusals(edited(written, tmp_path / "x", "mcore", drop=(name,)))
        assert name in where
    for name, value in (("hidden_size", "48"), ("num_layers", True), ("rotary_base", "big"), ("norm_epsilon", -1.0)):
        assert refusals(edited(written, tmp_path / "x", "mcore", **{name: value}))
    path = tmp_path / "x" / "release" / "common.pt"
    state = torch.load(path, weights_only=False)
    good = torch.load(written / "mcore" / "release" / "common.pt", weights_only=False)["args"]
    for args, is_read in ((vars(good), True), (None, False), ([good], False), (argparse.Namespace(), False)):
        torch.save({**state, "args": args}, path)
        assert bool(refusals(tmp_path / "x")) is not is_read


def test_gpt2_arguments_beside_its_config(tmp_path):
    """A GPT-2 is not read from arguments alone; its config.json must say the same as they do."""
    _, hf = layer_norm_models.saved(tmp_path / "hf", "gpt2", "GPT2LMHeadModel", n_layer=2)
    convert(formats.open(hf), tmp_path / "mcore", "mcore")
    (tmp_path / "mcore" / "dims.json").unlink()
    gpt2 = {
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
        "position_embedding_type": "learned_absolute",
        "bias_gelu_fusion": True,
        "rotary_base": 10_000,
        "rotary_percent": 1.0,
    }
    alone = refusals(edited(tmp_path, tmp_path / "x", "mcore", **gpt2))
    assert {"normalization", "swiglu", "add_bias_linear", "position_embedding_type"} <= set(alone)
    assert refusals(edited(tmp_path, tmp_path / "x", "mcore", "config.json", **gpt2)) == []
    for name, value in {
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "squared_relu": True,
        "num_layers": 3,
    }.items():
        assert refusals(edited(tmp_path, tmp_path / "x", "mcore", "config.json", **{**gpt2, name: value})) == [name]
    unfused = {**gpt2, "bias_gelu_fusion": False}
    assert refusals(edited(tmp_path, tmp_path / "x", "mcore", "config.json", **unfused)) == ["activation"]


def test_families_that_megatron_does_not_compute(tmp_path):
    """A real run's arguments beside a config of parallel layers: the tensors fit, the network is another."""
    _, hf = layer_norm_models.saved(tmp_path / "hf", "gpt_neox", "GPTNeoXForCausalLM", num_hidden_layers=2)
    convert(formats.open(hf), tmp_path / "mcore", "mcore")
    assert formats.open(tmp_path / "mcore").model_config.parallel_residual
    where = refusals(edited(tmp_path, tmp_path / "x", "mcore", apply_residual_connection_post_layernorm=False))
    assert where == ["apply_residual_connection_post_layernorm"]


# Every field of TransformerConfig and argument of GPTModel under --long.
PERTURBED = (
    "activation_func_clamp_value", "add_qkv_bias", "glu_linear_offset", "layernorm_epsilon", "no_rope_freq",
    "num_query_groups", "position_embedding_type", "qk_l2_norm", "rope_scaling", "rotary_base", "rotary_interleaved",
    "rotary_percent", "seq_len_interpolation_factor", "softmax_scale", "softmax_type", "window_size",
)  # fmt: skip


@pytest.mark.parametrize(
    ("names", "read", "refused"),
    [(list(PERTURBED), 10, 30), pytest.param(None, 80, 200, marks=pytest.mark.long)],
    ids=["some", "all"],
)
def test_a_changed_model_is_read_as_such_or_refused(pools, tmp_path, names, read, refused):
    results = pools(1).run(megatron_perturbation.perturb, timeout=900, root=str(tmp_path), names=names)
    assert results["silent"] == []
    assert not Path("other").exists()
    counts = results["counts"]
    print(counts, results["not_computed"])
    assert counts["moved, read"] > read and counts["moved, refused"] > refused and counts["not moved, read"] > 5


def test_other_backends_are_refused_by_name(written, tmp_path):
    folder = edited(written, tmp_path / "x", "mcore")
    config = folder / "release" / "metadata.json"
    config.write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    (folder / "release" / ".metadata").rename(tmp_path / "metadata")
    with pytest.raises(CheckpointError, match=r"torch_dist.*zarr"):
        formats.open(folder)
    config.unlink()
    (tmp_path / "metadata").rename(folder / "release" / ".metadata")
    # Its names still say what it is.
    assert formats.open(folder).format == "mcore"
