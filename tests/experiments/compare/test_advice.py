"""What advice says of probes that are made up: scratch that won, ties, and all that diverged."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.advise import advise, probe_comparison, rank_probes
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.experiments.compare.comparison_config import Arm
from megatron_ligo.training.initial_weights import sizes
from tests.experiments.compare.made_up_runs import MadeUp, made_spec

METHODS = ("lossless", "noisy_stack")


def advised(folder: Path, losses: dict[str, float | None], fit: bool = False) -> dict:
    """losses: after the lag, by the start of a run's name; None where it diverged. The longest name counts."""

    def end(name: str) -> float | None:
        return losses[max((part for part in losses if name.startswith(f"{part}/")), key=len)]

    config: RunConfig = made_spec(folder).config
    spec = probe_comparison(config, [Arm(name, config) for name in METHODS], (1e-3,), lag=100)
    plan: ComparisonPlan = MadeUp(folder, end).plan(spec)
    small: ModelConfig = sizes(Path(config.small.path))
    return rank_probes(plan, small, {}, fit)


def test_scratch_that_won_is_the_first_word(tmp_path):
    found = advised(tmp_path, {"scratch": 5.0, "lossless": 6.0, "noisy_stack": 5.5})
    assert found["advice"][0] == "Scratch was lower: do not grow (at this lag)."
    assert not any(line.startswith("Take") for line in found["advice"])
    text = " ".join(found["advice"])
    assert "The best growth: method = 'noisy_stack'" in text and "-0.5000 against it (one seed: no verdict)" in text


def test_growth_that_won_is_taken(tmp_path):
    found = advised(tmp_path, {"scratch": 6.0, "lossless": 5.5, "noisy_stack": 5.0})
    assert found["advice"][0].startswith("Take method = 'noisy_stack', with a peak rate of 0.001: 5.0000")
    assert "Next: method = 'lossless', +0.5000; on another seed +0.5000: the same order." in found["advice"]
    assert found["refused"] == {}


def test_a_fit_has_a_second_seed_and_a_name_that_a_user_can_write(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "noisy_stack": 5.5}
    ahead = {"lossless.fitted": 4.99999, "noisy_stack.fitted": 5.4}
    found = advised(tmp_path, losses | ahead, fit=True)
    assert [row["other_seed"] for row in found["ranking"]] == [4.99999, 5.0, 5.4, 5.5]
    assert found["advice"][0].startswith("Take method = 'lossless' with [fit], ")
    assert "Next: method = 'lossless', +0.0000; on another seed +0.0000: a tie." in found["advice"]
    assert found["probes"] == 3 + 3 * 2


def test_seeds_that_disagree_are_a_tie(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "noisy_stack": 5.1, "noisy_stack/seed_2": 4.9}
    assert "on another seed -0.1000: a tie" in " ".join(advised(tmp_path, losses)["advice"])


def test_a_winner_that_diverged_on_another_seed_is_not_taken(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "lossless/seed_2": None, "noisy_stack": 5.5}
    found = advised(tmp_path, losses)
    assert found["advice"][0].startswith("Take method = 'noisy_stack'")
    assert "On another seed method = 'lossless' diverged at 0.001" in found["advice"][1]
    assert "Next: method = 'lossless', -0.5000 (one seed: no verdict)." in found["advice"]
    assert found["refused"] == {"lossless, seed 2": "it diverged"}


def test_all_that_diverged_is_named(tmp_path):
    losses = {"scratch": None, "lossless": None, "noisy_stack": 5.5, "noisy_stack.fitted": None}
    found = advised(tmp_path, losses, fit=True)
    assert found["refused"] == dict.fromkeys(("scratch", "lossless", "noisy_stack.fitted"), "it diverged")
    assert any(line.startswith("Scratch diverged") for line in found["advice"])
    none = advised(tmp_path, dict.fromkeys(("scratch", "lossless", "noisy_stack")))
    assert none["advice"] == ["Every method diverged: try lower rates."] and len(none["refused"]) == 3


@pytest.mark.parametrize("flops", [math.nan, math.inf, 0.0, -1.0])
def test_flops_and_rates_are_finite_numbers_above_0(flops, tmp_path):
    with pytest.raises(ConfigError) as caught:
        advise(made_spec(tmp_path).config, tmp_path, flops, (1e-3, -1e-3, math.nan, 1e-3))
    text = str(caught.value)
    assert text.count("a finite number more than 0") == 3 and "found -0.001" in text and "each once" in text


def test_probes_need_held_out_text_and_no_lag_of_a_fit(tmp_path):
    config = made_spec(tmp_path).config
    wrong = replace(config, data=replace(config.data, valid=()), fit=replace(config.fit, lag="there"))
    with pytest.raises(ConfigError) as caught:
        advise(wrong, tmp_path, 1e12, (1e-3,))
    assert "data.valid: expected held-out prefixes" in str(caught.value)
    assert "fit.lag: expected left out" in str(caught.value)
