"""Rotary positions in Megatron-LM's args: what Megatron-core's own models compute from them is what we mean."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.rope_frequencies import rotary_frequencies
from megatron_ligo.arch.rope_scaling import attention_factor
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.megatron_lm import rope_arguments
from megatron_ligo.common.errors import CheckpointError, ErrorCollector
from tests.checkpoint import hf_models
from tests.checkpoint.formats import rope_ranks
from tests.models.mcore.rope_kinds import ORIGINAL, SCALINGS
from tests.tiny_models import llama_config

LLAMA32 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
SAYABLE = {
    "none": None,
    "linear": SCALINGS["linear"],
    "whole": {"rope_type": "linear", "factor": 4.0},
    "llama3": {**LLAMA32, "factor": 8.0},
    "llama3.2": LLAMA32,
    **{name: scaling for name, scaling in SCALINGS.items() if "yarn" in name},
}
UNSAYABLE = {name: SCALINGS[name] for name in ("dynamic", "llama3", "longrope")} | {
    "yarn that shrinks": {"rope_type": "yarn", "factor": 0.5, "attention_factor": 1.2, ORIGINAL: 8},
}
FORMATS = ("mcore", "megatron")


def saved(folder, scaling: Mapping | None):
    # 64 tokens of base 5000 reach the long wavelengths of Llama 3's rule.
    return hf_models.saved(folder, "llama", head_dim=4, rope_theta=1e6, rope_scaling=dict(scaling or {}))


def test_megatron_core_computes_from_our_args_what_transformers_does(pools, tmp_path):
    ids, folders, expected = torch.randint(0, 37, (2, 40)), [], []
    for name, scaling in SAYABLE.items():
        network, folder = saved(tmp_path / name, scaling)
        convert(formats.open(folder), tmp_path / f"{name}-mcore", "mcore")
        folders.append(str(tmp_path / f"{name}-mcore" / "release"))
        with torch.no_grad():
            expected.append(network(ids).logits)
    logits = pools(1).run(rope_ranks.compute_logits, folders=folders, ids=ids)
    for name, ours, theirs in zip(SAYABLE, logits, expected, strict=True):
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 5e-6, name
    assert all(float((theirs - expected[0]).abs().max()) > 1e-4 for theirs in expected[1:])


@pytest.mark.parametrize("format_name", FORMATS)
def test_the_args_alone_state_the_scaling(tmp_path, format_name):
    for name, scaling in SAYABLE.items():
        _, folder = saved(tmp_path / name, scaling)
        convert(formats.open(folder), tmp_path / f"{name}-out", format_name)
        (tmp_path / f"{name}-out/dims.json").unlink()
        convert(formats.open(tmp_path / f"{name}-out"), tmp_path / f"{name}-back", "hf")
        ids = hf_models.tokens()
        first, again = (AutoModelForCausalLM.from_pretrained(tmp_path / path) for path in (name, f"{name}-back"))
        with torch.no_grad():
            assert torch.allclose(first(ids).logits, again(ids).logits, atol=2e-6), name


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", UNSAYABLE)
def test_what_the_args_cannot_state_is_refused_before_anything_is_written(tmp_path, format_name, name):
    _, folder = saved(tmp_path / "hf", UNSAYABLE[name])
    with pytest.raises(CheckpointError, match="The formats hf and universal can"):
        convert(formats.open(folder), tmp_path / "out", format_name)
    assert not (tmp_path / "out").exists()
    convert(formats.open(folder), tmp_path / "universal", "universal")
    again = formats.open(tmp_path / "universal").model_config
    assert again == formats.open(folder).model_config


def test_other_versions_of_megatron_lm_are_warned_of(tmp_path, caplog):
    for scaling, expected in (
        (LLAMA32, "--use-rope-scaling --rope-scaling-factor 32. Versions that do not hand rope_scaling_factor"),
        ({**LLAMA32, "factor": 8.0}, "pass --use-rope-scaling --rope-scaling-factor 8"),
        (SCALINGS["linear"], "--rotary-seq-len-interpolation-factor 2.5"),
        (SCALINGS["yarn"], "--rotary-scaling-factor 4.0 --mscale 1.0"),
    ):
        caplog.clear()
        _, folder = saved(tmp_path / json.dumps(scaling)[:40], scaling)
        convert(formats.open(folder), tmp_path / f"{len(caplog.messages)}-{scaling['factor']}", "mcore")
        assert any(expected in message for message in caplog.messages)
    assert not rope_arguments.explain_reading(llama_config())


def draw_args(rng: random.Random) -> dict:
    args: dict[str, object] = {"rotary_base": rng.choice([500, 10000, 1000000])}
    kind = rng.choice(["rope", "rope", "yarn"])
    if kind == "yarn":
        args["position_embedding_type"] = "yarn"
        choices = {
            "rotary_scaling_factor": [1.0, 4.0, 40.0],
            "yarn_original_max_position_embeddings": [16, 1000],
            "yarn_beta_fast": [8.0],
            "yarn_beta_slow": [0.5],
            "mscale": [0.7, 0.0],
            "mscale_all_dim": [1.3],
            "yarn_correction_range_round_to_int": [False],
        }
        args |= {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.5}
    elif rng.random() < 0.5:
        args |= {"use_rope_scaling": True, "rope_scaling_factor": rng.choice([2.0, 8.0, 32.0])}
    elif rng.random() < 0.8:
        args["rotary_seq_len_interpolation_factor"] = rng.choice([None, 1, 4, 2.5])
    return args


def test_megatron_core_s_own_embeddings_are_read_as_they_compute(pools):
    rng = random.Random(0)
    draws = [draw_args(rng) for _ in range(60)]
    computed = pools(1).run(rope_ranks.compute_angles, argument_sets=draws, length=50)
    for args, (angles, factor) in zip(draws, computed, strict=True):
        # Megatron-LM's args always have both.
        stated = {"use_rope_scaling": False, "rope_scaling_factor": 8.0, **args}
        errors = ErrorCollector("args")
        rope_arguments.check_rope_args(stated, errors)
        assert not errors.problems
        sizes = rope_arguments.parse_rope_args(stated)
        model_config = llama_config(num_heads=2, num_kv_heads=2, head_dim=16, **sizes)
        expected = torch.arange(50.0)[:, None] * rotary_frequencies(model_config, 50)
        assert torch.allclose(angles, expected.repeat(1, 2), rtol=3e-6, atol=1e-6), args
        assert attention_factor(model_config.rope_scaling) == pytest.approx(factor, rel=1e-9), args
        assert written_again(model_config) == pytest.approx(attention_factor(model_config.rope_scaling), rel=1e-12)


def written_again(model_config: ModelConfig) -> float:
    """Returns the factor on cos and sin after a round trip through args."""
    args = rope_arguments.to_rope_args(model_config)
    again = llama_config(num_heads=2, num_kv_heads=2, head_dim=16, **rope_arguments.parse_rope_args(args))
    assert torch.equal(rotary_frequencies(again, 50), rotary_frequencies(model_config, 50))
    return attention_factor(again.rope_scaling)


@pytest.mark.parametrize(
    "args",
    [
        {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 4},
        {"position_embedding_type": "yarn", "use_rope_scaling": True},
        {"position_embedding_type": "yarn", "rotary_seq_len_interpolation_factor": 2},
        {"position_embedding_type": "mrope"},
        {"position_embedding_type": "none"},
        {"rope_scaling_factor": 4.0},
    ],
    ids=str,
)
def test_args_that_no_scaling_states_are_refused(args):
    errors = ErrorCollector("args")
    rope_arguments.check_rope_args(args, errors)
    (problem,) = errors.problems
    assert any(name in problem.where for name in args)
