"""Each key of a config.json changed in turn: where transformers' logits move, ours move with them, or it is refused."""

from __future__ import annotations

import logging

import pytest
import transformers

from tests.checkpoint.config_perturbation import MODELS, Perturbation, Report

DAILY = ("mistral", "gpt2", "bert", "vit", "smollm3", "granite", "phi", "falcon")
LATER = [
    pytest.param(name, marks=pytest.mark.long)
    for name in (
        "qwen3",
        "olmo2",
        "gemma2",
        "olmo3",
        "gemma3_text",
        "ministral3",
        "ernie4_5",
        "gemma",
        "exaone4",
        "llama with biases",
        "arcee",
        "cohere",
        "cohere2",
        "glm4",
        "granite_swa",
        "llama4_text",
        "nemotron",
        "seed_oss",
        "vaultgemma",
        "falcon with one key head",
        "dinov2",
        "dinov2 with a gate",
        "dinov2_with_registers",
        "modernbert",
        "modernbert with biases",
    )
]


@pytest.fixture
def quiet():
    """transformers warns of most of the changes."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    transformers.utils.logging.enable_progress_bar()
    transformers.utils.logging.set_verbosity(level)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("model_type", [*DAILY, *LATER])
def test_each_key_is_changed_once(tmp_path, model_type):
    """Every key that is not known to be harmless."""
    perturbation, report = Perturbation(model_type, tmp_path), Report()
    for key in perturbation.keys():  # noqa: SIM118 - no dict
        if key not in perturbation.table.harmless:
            perturbation.check(key, perturbation.another_value(key), report)
    assert not report.silent
    assert report.outcomes["moved equally"] > 1


@pytest.mark.long
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("model_type", MODELS)
def test_each_key_is_given_every_kind_of_value(tmp_path, model_type):
    perturbation, report = Perturbation(model_type, tmp_path), Report()
    for key in perturbation.keys():  # noqa: SIM118 - no dict
        for value in perturbation.values(key):
            perturbation.check(key, value, report)
    print(model_type, len(perturbation.keys()), "keys", dict(report.outcomes))
    assert not report.silent
    assert report.outcomes["moved equally"] > 10
