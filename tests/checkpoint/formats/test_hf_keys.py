"""The allow-list of config.json: held against transformers' own classes, and against files of the hub."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields

import pytest
import torch
import transformers
from gguf.constants import MODEL_ARCH_NAMES
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.arch import architectures, other_families
from megatron_ligo.arch.common_params import ACTIVATION_SYNONYMS
from megatron_ligo.checkpoint import formats, model_record
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.formats.hf.config_keys import LABELS, key_table
from megatron_ligo.checkpoint.source_keys import AcceptedKeys, is_empty, is_same_value
from megatron_ligo.common.errors import CheckpointError
from tests import layer_norm_models
from tests.checkpoint import hf_models, hub_configs
from tests.checkpoint.config_perturbation import MODELS

MODEL_TYPES = [name for arch in architectures().values() for name in arch.model_types]
# Attributes that transformers reads from a config object, and that no config.json states: methods' and classes' own.
OF_THE_OBJECT = {
    "_heterogeneity_spec", "_output_attentions", "_post_init_done", "_rope_type_labels", "base_model_ep_plan",
    "base_model_fsdp_plan", "base_model_pp_plan", "base_model_tp_plan", "default_rope_type", "default_theta",
    "ignore_keys_at_rope_validation", "is_heterogeneous", "sub_configs", "sub_configs_defaults",
}  # fmt: skip
# Read by transformers without a declaration. An empty value is what it assumes if the key is missing, so that a key
# that is in no table is refused exactly if it says something.
NEUTRAL_IF_EMPTY = {
    "decoder", "generator", "gguf_file", "mlp_layer_types", "mtp_layer_types", "num_heads", "partial_rotary_factor",
    "rope_parameters", "rope_theta", "text_config", "vision_aspect_ratio", "vision_feature_layer",
    "vision_feature_select_strategy", "vocab_size", "use_cache", "tie_word_embeddings", "layer_types",
}  # fmt: skip

# Their classes read a head_dim that they do not declare.
READ_HEAD_DIM = (
    "granite_swa",
    "qwen2_moe",
    "qwen3_moe",
    "qwen2",
    "granite",
    "olmo2",
    "olmo3",
    "smollm3",
    "exaone4",
    "cohere",
    "phi",
)

# Without them, the defaults are a model with experts.
NEEDED = {"llama4_text": {"moe_layers": []}}
PARTLY_ROTATED = ("phi", "phi3", "stablelm", "glm4", "nemotron")


def problems(config: dict, accept: tuple[str, ...] = ()) -> list[str]:
    """Returns the keys that a config is refused for."""
    try:
        config_json.parse_model_config(config, "config.json", AcceptedKeys(accept))
    except CheckpointError as error:
        return [problem.where for problem in error.problems]
    return []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_key_of_transformers_is_classified(model_type):
    """An upgrade of transformers that adds a key fails here."""
    config_class = CONFIG_MAPPING[model_type]
    declared = {field.name for field in fields(config_class)} | set(config_class().to_dict())
    generation = {*GenerationConfig().to_dict(), *GenerationConfig._get_default_generation_params()}
    table = key_table(model_type)
    assert {*declared, *config_class.attribute_map, *generation} <= {
        *table.fields, *table.harmless, *table.fixed
    }  # fmt: skip


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_missing_key_means_what_transformers_assumes(model_type):
    table = key_table(model_type)
    defaults = {field.name: field.default for field in fields(CONFIG_MAPPING[model_type])}
    (arch,) = (arch for arch in architectures().values() if model_type in arch.model_types)
    renewed = {key for older, _ in arch.hf_older_forms for key in older}
    for key, values in table.fixed.items():
        if key in renewed:
            # Whose default is the older form.
            continue
        default = defaults.get(key, MISSING)
        assert default is MISSING or any(is_same_value(default, value) for value in values), key


def test_every_key_that_transformers_reads_is_classified(tmp_path, monkeypatch):
    """Load, run and generate with real classes: also the keys that no class declares are known."""
    reads: set[str] = set()
    original = PreTrainedConfig.__getattribute__

    def record(config, name):
        reads.add(name)
        return original(config, name)

    for model_type, (class_name, sizes) in MODELS.items():
        model_type = model_type.partition(" ")[0]
        network_class, config_class = getattr(transformers, class_name), CONFIG_MAPPING[model_type]
        network_class(config_class(**sizes)).save_pretrained(tmp_path / model_type)
        reads.clear()
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedConfig, "__getattribute__", record)
            network = network_class.from_pretrained(tmp_path / model_type).eval()
            with torch.no_grad():
                if "image_size" in sizes:
                    network(torch.randn(1, sizes["num_channels"], 12, 12))
                elif network.can_generate():
                    network.generate(torch.tensor([[3, 4, 5, 6]]), max_new_tokens=2, do_sample=False)
                else:
                    network(torch.tensor([[3, 4, 5, 6]]))
        names = {
            name for name in reads if not name.startswith("__") and not callable(getattr(config_class, name, None))
        }
        table = key_table(model_type)
        unknown = names - OF_THE_OBJECT - NEUTRAL_IF_EMPTY - {*table.fields, *table.harmless, *table.fixed}
        assert not unknown, model_type


@pytest.mark.parametrize("name", hub_configs.CONFIGS)
def test_configs_of_the_hub(name):
    config, expected = hub_configs.CONFIGS[name]
    sizes = config_json.parse_model_config(config, name).to_json()
    assert {key: sizes[key] for key in expected} == expected
    carried = config_json.parse_carried(config)
    table = key_table(config["model_type"])
    assert all(key in table.harmless or key == LABELS or is_empty(value) for key, value in carried.items())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_unknown_key_is_refused_unless_it_is_accepted(model_type):
    config = {"model_type": model_type, **NEEDED.get(model_type, {})}
    assert not problems(config)
    for value in (True, 2, "x", [0, 1], {"a": 1}):
        assert problems(config | {"a_new_key": value}) == ["a_new_key"]
        assert not problems(config | {"a_new_key": value}, ("a_new_key",))
    for value in (None, False, 0, "", [], {}):
        assert not problems(config | {"a_new_key": value})
    assert "a_new_key" not in config_json.parse_carried(config | {"a_new_key": 2})
    for key, value in {"auto_map": {"AutoModel": "x.Y"}, "per_layer_config": {"1": {"intermediate_size": 8}}}.items():
        assert problems(config | {key: value}, (key,)) == [key]


REFUSED = [
    ("llama", {"attention_bias": 1}), ("llama", {"mlp_bias": None}), ("llama", {"sliding_window": 8}),
    ("llama", {"is_causal": False}), ("llama", {"is_causal": None}), ("llama", {"rope_interleaved": True}),
    ("llama", {"use_mrope": True}), ("llama", {"quantization_config": {}}), ("llama", {"hidden_act": "gelu"}),
    ("llama", {"no_rope_layers": [1, 0]}), ("llama", {"logits_scaling": 8.0}), ("llama", {"hidden_act": 1}),
    ("llama", {"pruned_heads": {"0": [1]}}), ("llama", {"attention_chunk_size": 8}), ("llama", {"layer_types": []}),
    ("mistral", {"use_sliding_window": True}), ("mistral", {"mlp_bias": 1}), ("qwen2", {"use_sliding_window": 1}),
    ("qwen2", {"layer_types": ["sliding_attention"]}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}), ("gpt2", {"add_cross_attention": True}), ("gpt2", {"is_causal": False}),
    ("gpt_neox", {"attention_bias": False}), ("gpt_neox", {"head_dim": 32}), ("bert", {"is_decoder": True}),
    ("bert", {"is_causal": True}), ("bert", {"position_embedding_type": "relative_key"}),
    ("roberta", {"pad_token_id": -1}), ("vit", {"qkv_bias": False}), ("vit", {"pooler_act": "relu"}),
    ("vit", {"head_dim": 8}), ("deit", {"pooler_output_size": 12}),
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "change"), REFUSED, ids=str)
def test_values_that_change_the_network_are_refused(model_type, change):
    assert problems({"model_type": model_type} | change)


def test_a_hint_says_what_to_do():
    with pytest.raises(CheckpointError) as refusal:
        config_json.parse_model_config({"model_type": "llama", "quantization_config": {"bits": 4}}, "config.json")
    assert refusal.value.problems[0].hint == "Dequantise the weights first."


def test_roberta_has_a_padding_token():
    """transformers cannot count positions without one."""
    assert problems({"model_type": "roberta", "pad_token_id": None}) == ["position_padding"]
    assert not problems({"model_type": "bert", "pad_token_id": None})


def test_names_of_one_size_agree():
    """transformers reads the names of other families for GPT-2's sizes, and lets them win."""
    config = {"model_type": "gpt2", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = config_json.parse_model_config(config, "config.json")
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads) == (48, 2, 4)
    assert not problems(config | {"n_embd": 48})
    assert problems(config | {"n_embd": 96}) == ["hidden_size"]
    assert "hidden_size" not in config_json.parse_carried(config)


def test_square_images_may_state_both_sides():
    config = {"model_type": "vit", "image_size": [32, 32], "patch_size": [8, 8]}
    assert config_json.parse_model_config(config, "config.json").image_size == 32
    assert "image_size" in problems(config | {"image_size": [32, 16]})
    names = {"0": "a", "1": "b", "2": "c"}
    assert config_json.parse_model_config(config | {"id2label": names}, "config.json").vocab_size == 3
    # transformers replaces the names then.
    assert config_json.parse_model_config(config | {"id2label": names, "num_labels": 7}, "config.json").vocab_size == 7


def test_activations_with_two_names():
    for name, known in ACTIVATION_SYNONYMS.items():
        numbers = torch.linspace(-12, 12, 10001)
        torch.testing.assert_close(ACT2FN[name](numbers), ACT2FN[known](numbers), atol=2e-6, rtol=0)
        assert config_json.parse_model_config({"model_type": "bert", "hidden_act": name}, "x").activation == known
    assert not problems({"model_type": "llama", "hidden_act": "swish"})


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_written_keys_are_of_the_class(model_type):
    """Another family's key may mean something to another program: vLLM reads Qwen's use_sliding_window for Mistral."""
    config = {"model_type": model_type, **NEEDED.get(model_type, {})}
    model_config = config_json.parse_model_config(config, "config.json")
    written = config_json.to_hf_config(model_config, {}, torch.float32)
    declared = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    older = {
        "torch_dtype",
        "rope_theta",
        "rope_scaling",
        "rotary_emb_base",
        "rotary_pct",
        "num_labels",
        "rope_local_base_freq",
        "global_rope_theta",
        "local_rope_theta",
    }
    older |= {"bos_token_id", "eos_token_id", "pad_token_id", "position_embedding_type"}
    # transformers reads these without declaring them.
    undeclared = {"head_dim"} if model_type in READ_HEAD_DIM else set()
    undeclared |= {"partial_rotary_factor"} if model_type in PARTLY_ROTATED else set()
    assert set(written) - declared - older - {"model_type"} <= undeclared
    assert config_json.parse_model_config(written, "config.json") == model_config


def _normalised(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum()).removesuffix("text")


def test_the_error_names_every_other_family():
    names = {*CONFIG_MAPPING, *MODEL_ARCH_NAMES.values()}
    for name in CONFIG_MAPPING:
        if name in MODEL_TYPES:
            continue
        with pytest.raises(CheckpointError) as refusal:
            config_json.find_architecture({"model_type": name}, "config.json")
        (problem,) = refusal.value.problems or refusal.value.args
        assert repr(name)[:60] in problem
        assert "network differs" in problem
        assert "Did you mean" not in problem
    assert set(other_families.DIFFERENCES) <= {_normalised(name) for name in names}
    assert not set(other_families.DIFFERENCES) & set(MODEL_TYPES)
    for name in (None, "", 3, ["llama"], {"llama": 1}):
        with pytest.raises(CheckpointError):
            config_json.find_architecture({"model_type": name}, "config.json")


@pytest.mark.parametrize("name", ["smollm3", "granite", "ernie4_5", "gemma", "cohere2", "olmo2", "mixtral", "mpt"])
def test_a_changed_model_type_does_not_help(name):
    """The class named in the config gives it away, or the keys of its own family."""
    config = CONFIG_MAPPING[name](architectures=["XForCausalLM"]).to_dict()
    assert "architectures" in problems(config | {"model_type": "llama"})
    # The norms of OLMo 2 are tensors of their own, no keys.
    if name != "olmo2":
        assert problems(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})


def test_dims_json_and_config_json_agree(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "universal")
    record = tmp_path / "b" / model_record.RECORD
    for place in (folder, tmp_path / "b"):
        (place / "config.json").write_bytes((folder / "config.json").read_bytes())
        (place / model_record.RECORD).write_bytes(record.read_bytes())
        formats.open(place)
    data = json.loads(record.read_text())
    for size, value in {"norm_eps": 0.5, "rope_base": 7.0, "model_type": "mistral"}.items():
        for place in (folder, tmp_path / "b"):
            changed = {**data, "dims": {**data["dims"], size: value}}
            (place / model_record.RECORD).write_text(json.dumps(changed))
            with pytest.raises(CheckpointError) as refusal:
                formats.open(place)
            (problem,) = refusal.value.problems
            assert problem.where == f"{place / model_record.RECORD}: {size}"


def test_a_record_carries_harmless_keys_only(tmp_path):
    _, folder = layer_norm_models.saved(tmp_path / "a", "gpt2", "GPT2LMHeadModel")
    convert(formats.open(folder), tmp_path / "b", "universal")
    record = tmp_path / "b" / model_record.RECORD
    data = json.loads(record.read_text())
    for key, value in {"hidden_size": 96, "is_causal": False, "a_new_key": 3}.items():
        record.write_text(json.dumps(data | {"carried": data["carried"] | {key: value}}))
        with pytest.raises(CheckpointError) as refusal:
            formats.open(tmp_path / "b")
        assert [problem.where for problem in refusal.value.problems] == [key]
    # Neutral values, as earlier versions of this program carried them.
    neutral = {"pruned_heads": {}, "is_encoder_decoder": False, "head_dim": None}
    record.write_text(json.dumps(data | {"carried": data["carried"] | neutral}))
    assert not set(neutral) & set(formats.open(tmp_path / "b").carried)
    record.write_text(json.dumps(data | {"carried": data["carried"] | {"a_new_key": 3}}))
    reader = formats.open(tmp_path / "b", accept=["a_new_key"])
    assert (reader.accepted, "a_new_key" in reader.carried) == ({"a_new_key": 3}, False)
