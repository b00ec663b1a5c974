"""Rotary keys of config.json: where transformers' logits move, those of our reading move with them, or it refuses."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint import hf_models
from tests.checkpoint.library_refusals import check_raised_by_library
from tests.models.mcore.rope_kinds import ORIGINAL, SCALINGS

PLAIN = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 20,
    "rope_theta": 500.0,
}
NEOX = {key: value for key, value in PLAIN.items() if key not in ("num_key_value_heads", "head_dim", "rope_theta")}
NEOX |= {"model_type": "gpt_neox", "rotary_emb_base": 500.0, "rotary_pct": 0.5}
BASES = {"llama": PLAIN, "mistral": {**PLAIN, "model_type": "mistral"}, "qwen2": {**PLAIN, "model_type": "qwen2"}}
YARN = {"type": "yarn", "factor": 4.0, ORIGINAL: 10}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {**SCALINGS["llama3"], ORIGINAL: 16}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [2.0, 3.0, 4.0, 5.0], ORIGINAL: 16,
}  # fmt: skip
# The length of the samples: more than the context, so that `dynamic` scales.
LENGTH = 24


def perturbed(scaling: dict) -> list[dict]:
    """Returns the scaling with each key changed in turn, left out, null, and of a wrong type; and with more keys."""
    results = [scaling]
    for key, value in scaling.items():
        others = [None, "4", 0, True, 3]
        if isinstance(value, list):
            others += [[2 * x for x in value], value[1:], [*value[1:], "1"]]
        results += [{**scaling, key: other} for other in others]
        results.append({other: kept for other, kept in scaling.items() if other != key})
    more = {
        "attention_factor": [1.5, 0.0, None], "beta_fast": [4.0, 0, None], "beta_slow": [0.25, None],
        "mscale": [0.5, 0.0], "mscale_all_dim": [0.5], "truncate": [False, True, None], "finetuned": [True],
        "rope_theta": [77.0], "partial_rotary_factor": [1.0, 0.5, None], "type": ["linear", "yarn"],
        "low_freq_factor": [2.0], "original_max_position_embeddings": [13, None], "mrope_section": [[1, 1, 2]],
        "short_factor": [[1.0, 1.0, 1.0, 3.0]], "unknown": [1],
    }  # fmt: skip
    return results + [{**scaling, key: value} for key, values in more.items() for value in values]


def rope_changes() -> list[dict]:
    """Returns changes of a config's top level."""
    changes: list[dict] = [{}, {"rope_theta": 33.0}, {"rope_theta": None}, {"partial_rotary_factor": 0.5}]
    for scaling in (YARN, LINEAR, LLAMA3, LONGROPE, {"rope_type": "dynamic", "factor": 2.0}):
        changes += [{"rope_scaling": changed} for changed in perturbed(scaling)]
        changes += [{"rope_parameters": {"rope_theta": 500.0, **scaling}}, {"rope_parameters": scaling}]
        changes += [{"rope_scaling": scaling, ORIGINAL: 11}, {"rope_parameters": scaling, ORIGINAL: 11}]
    changes += [{"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 2.0}}]
    changes += [{"rope_scaling": {"rope_type": kind, "factor": 2.0}} for kind in ("proportional", "su", "default", "")]
    changes += [{"rope_scaling": {"rope_type": "proportional"}}, {"rope_scaling": {"factor": 2.0}}]
    for empty in ({}, None, [], False):
        changes.append({"rope_scaling": empty, "rope_parameters": {**LINEAR, "rope_theta": 9.0}})
    for first in (YARN, {"rope_type": "default"}, {**LINEAR, "rope_theta": 77.0}):
        both = {"rope_scaling": first, "rope_parameters": {**LLAMA3, "rope_theta": 9.0}}
        changes += [both, {**both, "rope_theta": None}]
    changes += [{"rope_parameters": {"full_attention": LINEAR}}, {"rope_parameters": {"sliding_attention": LINEAR}}]
    return changes


def without_absent(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "rope_theta" or value is not None}


@torch.no_grad()
def compute_logits(config: dict, state: dict | None = None) -> tuple[torch.Tensor, dict]:
    """Returns transformers' logits with these weights (None: random ones), and the weights."""
    torch.manual_seed(0)
    read = CONFIG_MAPPING[config["model_type"]](**json.loads(json.dumps(config)))
    network = AutoModelForCausalLM.from_config(read).eval()
    for parameter in network.parameters():
        parameter.normal_(0, 0.3)
    if state is not None:
        network.load_state_dict(state)
    ids = torch.randint(0, 32, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return network(ids).logits, network.state_dict()


@pytest.mark.parametrize("base", [PLAIN, pytest.param(NEOX, marks=pytest.mark.long)], ids=["llama", "gpt_neox"])
def test_each_rotary_key_moves_our_reading_as_it_moves_transformers(base, caplog):
    warnings.simplefilter("ignore")
    unmoved, state = compute_logits(base)
    num_moved = num_followed = 0
    for change in rope_changes():
        config = without_absent({**base, **change})
        try:
            expected, _ = compute_logits(config, state)
        except Exception as error:
            check_raised_by_library(error)
            continue
        moved = float((expected - unmoved).abs().max()) > 1e-5
        num_moved += moved
        try:
            model_config = config_json.parse_model_config(config, "config.json")
        except CheckpointError:
            continue
        written = config_json.to_hf_config(model_config, {}, torch.float32)
        logits, _ = compute_logits(written, state)
        assert torch.allclose(logits, expected, atol=2e-5), change
        num_followed += moved
    # Most are followed, or the test would prove little.
    assert num_followed > 0.4 * num_moved > 20, (num_followed, num_moved)


@pytest.mark.parametrize("model_type", BASES)
def test_a_scaling_that_a_user_adds_to_our_config_takes_effect(tmp_path, model_type):
    """Qwen's model card says so for long texts."""
    _, folder = hf_models.saved(tmp_path / "hf", model_type)
    convert(formats.open(folder), tmp_path / "ours", "hf")
    path = tmp_path / "ours/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rope_scaling": YARN}))
    assert AutoConfig.from_pretrained(tmp_path / "ours").rope_parameters["rope_theta"] == 5000.0
    convert(formats.open(tmp_path / "ours"), tmp_path / "again", "hf")
    ids = hf_models.tokens()
    with torch.no_grad():
        plain, scaled, again = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("hf", "ours", "again")
        )
    assert torch.equal(scaled, again)
    assert float((scaled - plain).abs().max()) > 1e-2
