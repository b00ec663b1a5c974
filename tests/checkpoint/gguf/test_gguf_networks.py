"""GGUF files of the families whose networks differ from Llama's, against what transformers and the gguf package make.

Files are written from transformers' own models: names by the gguf package's map, metadata by its writer, values as
llama.cpp's converter stores them.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_ligo.arch import get
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.formats.gguf.metadata_keys import classify
from megatron_ligo.common.errors import CheckpointError
from tests import layer_norm_models
from tests.checkpoint.gguf.network_cases import CASES, LAYER_NORMS, Case
from tests.checkpoint.gguf.test_gguf_keys import package_keys
from tests.tiny_models import tokens


def write(path: Path, case: Case, network: PreTrainedModel, changes: dict | None = None) -> Path:
    """Writes a model as llama.cpp's converter does. changes: metadata by key; None leaves a key out."""
    config, name = case.model_config, gguf.MODEL_ARCH_NAMES[case.arch]
    writer = GGUFWriter(path, name)
    for key, value in (metadata_of(case, config) | (changes or {})).items():
        add_value(writer, f"{name}.{key}", value)
    # The default of Phi-3 in transformers is beyond a tiny vocabulary.
    writer.add_pad_token_id(0)
    for tensor_name, tensor in tensors_of(case, config, network).items():
        writer.add_tensor(tensor_name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: GGUFWriter, key: str, value: object) -> None:
    adds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    if value is not None:
        getattr(writer, f"add_{adds[type(value)]}")(key, value)


def metadata_of(case: Case, config: ModelConfig) -> dict[str, object]:
    eps = "layer_norm_epsilon" if case.family in LAYER_NORMS else "layer_norm_rms_epsilon"
    scaling = config.rope_scaling or {}
    stated = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        f"attention.{eps}": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope.freq_base": config.rope_base,
        "rope.dimension_count": config.num_rotated,
        "attention.sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logits_softcap,
        "attention.temperature_scale": config.query_scaling_beta or None,
    }
    if case.family.startswith("gemma"):
        stated["rope.dimension_count"] = None
    if case.family.startswith("gemma") or case.family in ("glm4", "nemotron", "seed_oss"):
        stated |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if case.family == "falcon":
        stated["tensor_data_layout"] = "jploski"
    if case.family in ("cohere", "cohere2"):
        stated |= {"logit_scale": config.logits_multiplier, "rope.scaling.type": "none"}
    if case.family == "olmo3":
        stated["attention.sliding_window_pattern"] = list(config.window_layers)
    if case.family == "stablelm":
        stated |= {"use_parallel_residual": False, "rope.freq_base": None}
    if scaling:
        stated["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    if scaling.get("rope_type") == "yarn":
        stated |= {"rope.scaling.type": "yarn", "rope.scaling.factor": scaling["factor"]}
    if scaling.get("rope_type") == "longrope":
        stated["rope.scaling.attn_factor"] = scaling["attention_factor"]
    if case.family == "ministral3":
        stated["rope.scaling.yarn_log_multiplier"] = 1.0
    return stated


def tensors_of(case: Case, config: ModelConfig, network: PreTrainedModel) -> dict[str, torch.Tensor]:
    names = gguf.get_tensor_name_map(case.arch, config.num_layers)
    result = {}
    for hf_name, tensor in network.state_dict().items():
        if hf_name == "lm_head.weight" and config.tied:
            continue
        if case.interleaves and re.search(r"\.[qk]_proj\.weight$", hf_name):
            heads = tensor.shape[0] // config.head_dim
            tensor = tensor.reshape(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(tensor.shape)
        if hf_name.endswith("query_key_value.weight"):
            # Taken apart from its groups.
            groups = tensor.reshape(config.num_kv_heads, -1, config.head_dim, config.hidden_size)
            parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
            tensor = torch.cat([part.reshape(-1, config.hidden_size) for part in parts])
        if get(case.family).gain_offset and hf_name.endswith("norm.weight"):
            tensor = tensor + 1
        result[names.get_name(hf_name, try_suffixes=(".weight", ".bias"))] = tensor
    scaling = config.rope_scaling or {}
    for length in ("short", "long"):
        if f"{length}_factor" in scaling:
            result[f"rope_factors_{length}.weight"] = torch.tensor(scaling[f"{length}_factor"])
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_written_from(tmp_path, name):
    case = CASES[name]
    network = layer_norm_models.model_of(case.model_config)
    network.save_pretrained(tmp_path / "hf")
    source, reader = formats.open(tmp_path / "hf"), formats.open(write(tmp_path / "a.gguf", case, network))
    assert reader.model_config == source.model_config
    assert list(reader.keys()) == list(source.keys())
    for key in source.keys():  # noqa: SIM118 - no dict
        # 1 is added to Gemma's gains and taken off again.
        torch.testing.assert_close(reader.read(key), source.read(key), atol=2e-7, rtol=0)
        assert reader.info(key).dtype == reader.read(key).dtype


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.in_transformers])
def test_transformers_computes_the_same_from_the_file(tmp_path, name):
    case = CASES[name]
    path = write(tmp_path / "a.gguf", case, layer_norm_models.model_of(case.model_config))
    ids = tokens(case.model_config, length=5 if case.family == "phi3" else 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = layer_norm_models.outputs(formats.open(path), ids)
    assert float(expected.abs().max()) > 0.5
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def problems_of(tmp_path: Path, name: str, changes: dict) -> list[str]:
    case = CASES[name]
    path = write(tmp_path / "a.gguf", case, layer_norm_models.model_of(case.model_config), changes)
    with pytest.raises(CheckpointError) as error:
        formats.open(path)
    return [problem.where.removeprefix(f"{gguf.MODEL_ARCH_NAMES[case.arch]}.") for problem in error.value.problems]


REFUSED = [
    ("gemma2", {"attention.sliding_window": None}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": 0.0}),
    ("gemma2", {"rope.freq_base_swa": 7.0}),
    ("gemma2", {"attention.scale": 0.5}),
    ("gemma3", {"attention.sliding_window": 0}),
    ("gemma3", {"final_logit_softcapping": 30.0}),
    ("gemma3", {"attention.sliding_window_pattern": [True] * 6}),
    ("gemma3", {"attention.key_length_swa": 8}),
    ("phi3", {"attention.key_length": 8}),
    ("phi3", {"attention.sliding_window_pattern": 2}),
    ("phi3", {"rope.dimension_count": 5}),
    ("stablelm", {"use_parallel_residual": True}),
    ("stablelm", {"attention.layer_norm_epsilon": None}),
    ("smollm3", {"attention.sliding_window": 5}),
    ("falcon", {"tensor_data_layout": "Meta AI original pth"}),
    ("phi", {"use_parallel_residual": True}),
    ("cohere", {"attention.layer_norm_epsilon": None}),
    ("cohere2", {"attention.sliding_window": None}),
    ("cohere2", {"attention.sliding_window": 0}),
    ("cohere2", {"rope.freq_base_swa": 7.0}),
    ("glm4", {"rope.dimension_count": 14}),
    ("nemotron", {"attention.layer_norm_epsilon": None}),
    ("seed_oss", {"attention.sliding_window": 5}),
    ("seed_oss", {"rope.dimension_count": 4}),
    ("olmo3", {"rope.freq_base_swa": 7.0}),
    ("ministral3", {"rope.scaling.yarn_log_multiplier": None}),
    ("ministral3", {"rope.scaling.yarn_log_multiplier": 0.5}),
]


@pytest.mark.parametrize("name, changes", REFUSED, ids=str)
def test_what_llama_cpp_does_not_compute_is_refused_by_name(tmp_path, name, changes):
    (where,) = problems_of(tmp_path, name, changes)
    assert where in changes or where == "head_dim"


READ = [
    ("gemma2", {"attention.sliding_window_pattern": 4}, {"window_layers": (True, True, True, False)}),
    (
        "gemma2",
        {"attention.sliding_window_pattern": [True, True, False, True]},
        {"window_layers": (True, True, False, True)},
    ),
    ("gemma3", {"rope.freq_base_swa": 500.0}, {"window_rope_base": 500.0}),
    (
        "gemma3",
        {"attention.sliding_window_pattern": 1},
        {"sliding_window": None, "window_layers": None, "window_rope_base": None},
    ),
    ("phi3", {"attention.sliding_window": 0}, {"sliding_window": None}),
    ("olmo3", {"attention.sliding_window_pattern": None}, {"window_layers": (True, True, True, False)}),
    ("ministral3", {"attention.temperature_scale": 0.0}, {"query_scaling_beta": 0.0}),
    (
        "cohere2",
        {"attention.sliding_window_pattern": 3},
        dict.fromkeys(("window_layers", "rope_layers"), (True, True, False, True)),
    ),
]


@pytest.mark.parametrize("name, changes, expected", READ, ids=str)
def test_what_llama_cpp_follows_is_read(tmp_path, name, changes, expected):
    case = CASES[name]
    path = write(tmp_path / "a.gguf", case, layer_norm_models.model_of(case.model_config), changes)
    assert formats.open(path).model_config == replace(case.model_config, **expected)


def test_the_largest_gemmas_scale_scores_by_their_width(tmp_path):
    """llama.cpp knows the 27B models by their number of layers."""
    for name, layers, dim in (("gemma2", 46, 12), ("gemma2", 45, 256)):
        sizes = CASES[name].sizes | {"num_layers": layers, "window_layers": None, "ffn_size": 2}
        case = replace(CASES[name], sizes=sizes)
        path = write(tmp_path / "a.gguf", case, layer_norm_models.model_of(case.model_config))
        assert formats.open(path).model_config.attention_scale_dim == dim


@pytest.mark.parametrize("name", CASES)
def test_every_key_of_the_package_is_classified(name):
    case = CASES[name]
    arch_name = gguf.MODEL_ARCH_NAMES[case.arch]
    names = [key.replace("{arch}", arch_name) for key in package_keys()]
    assert [key for key in names if not classify(key, get(case.family), arch_name)] == []
