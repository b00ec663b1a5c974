"""Advice from made-up probes: scratch that wins, ties, and diverged probes."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.advise import advise, probe_comparison, rank_probes
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan
from megatron_ligo.experiments.compare.comparison_config import Arm
from megatron_ligo.experiments.compare.savings import UNKNOWN
from megatron_ligo.training.initial_weights import read_model_config
from megatron_ligo.training.lr_schedule import schedule_after_growth
from tests.experiments.compare.made_up_runs import MadeUpRuns, write_comparison

METHODS = ("lossless", "noisy_stack")


def advise_on(folder: Path, losses: dict[str, float | None], fit: bool = False) -> dict:
    """losses: after the lag, by prefix of a run's name (the longest wins); None if it diverged."""

    def end(name: str) -> float | None:
        return losses[max((part for part in losses if name.startswith(f"{part}/")), key=len)]

    config: RunConfig = write_comparison(folder).config
    spec = probe_comparison(config, [Arm(name, config) for name in METHODS], (1e-3,), lag=100)
    plan: ComparisonPlan = MadeUpRuns(folder, end).plan(spec)
    small: ModelConfig = read_model_config(Path(config.small.path))
    return rank_probes(plan, small, {}, fit)


def test_advice_begins_with_scratch_if_it_wins(tmp_path):
    record = advise_on(tmp_path, {"scratch": 5.0, "lossless": 6.0, "noisy_stack": 5.5})
    assert record["advice"][0] == "Scratch was lower: do not grow (at this lag)."
    assert not any(line.startswith("Use") for line in record["advice"])
    text = " ".join(record["advice"])
    assert "method = 'noisy_stack'" in text and f"-0.5000 relative to it ({UNKNOWN})" in text


def test_growth_that_wins_is_recommended(tmp_path):
    record = advise_on(tmp_path, {"scratch": 6.0, "lossless": 5.5, "noisy_stack": 5.0})
    assert record["ranking"][0]["method"] == "noisy_stack" and record["ranking"][0]["after_lag"] == 5.0
    assert record["advice"][0].startswith("Use method = 'noisy_stack' with a peak learning rate of 0.001: loss 5.0000")
    assert "Next: method = 'lossless', +0.5000; on another seed +0.5000: the same order." in record["advice"]
    assert record["refused"] == {}
    # The rate that pretraining then runs at is the one that was probed.
    config = RunConfig.from_dict(tomllib.loads(record["toml"]))
    assert config.operator.method == "noisy_stack" and schedule_after_growth(config.pretrain).lr == 1e-3


def test_a_fit_runs_on_a_second_seed_and_is_named_as_in_a_config(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "noisy_stack": 5.5}
    ahead = {"lossless.fitted": 4.99999, "noisy_stack.fitted": 5.4}
    record = advise_on(tmp_path, losses | ahead, fit=True)
    assert [row["other_seed"] for row in record["ranking"]] == [4.99999, 5.0, 5.4, 5.5]
    assert record["advice"][0].startswith("Use method = 'lossless' with [fit] ")
    assert "Next: method = 'lossless', +0.0000; on another seed +0.0000: a tie." in record["advice"]
    assert record["probes"] == 3 + 3 * 2


def test_seeds_that_disagree_are_a_tie(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "noisy_stack": 5.1, "noisy_stack/seed_2": 4.9}
    assert "on another seed -0.1000: a tie" in " ".join(advise_on(tmp_path, losses)["advice"])


def test_a_winner_that_diverged_on_another_seed_is_not_recommended(tmp_path):
    losses = {"scratch": 6.0, "lossless": 5.0, "lossless/seed_2": None, "noisy_stack": 5.5}
    record = advise_on(tmp_path, losses)
    assert record["advice"][0].startswith("Use method = 'noisy_stack'")
    assert "method = 'lossless' diverged at 0.001" in record["advice"][1]
    assert "Next: method = 'lossless', -0.5000 (one seed: no verdict)." in record["advice"]
    assert record["refused"] == {"lossless, seed 2": "it diverged"}


def test_diverged_probes_are_named(tmp_path):
    losses = {"scratch": None, "lossless": None, "noisy_stack": 5.5, "noisy_stack.fitted": None}
    record = advise_on(tmp_path, losses, fit=True)
    assert record["refused"] == dict.fromkeys(("scratch", "lossless", "noisy_stack.fitted"), "it diverged")
    assert any(line.startswith("Scratch diverged") for line in record["advice"])
    none = advise_on(tmp_path, dict.fromkeys(("scratch", "lossless", "noisy_stack")))
    assert none["advice"] == ["Every method diverged: try lower rates."] and len(none["refused"]) == 3


@pytest.mark.parametrize("flops", [math.nan, math.inf, 0.0, -1.0])
def test_flops_and_rates_are_finite_numbers_above_0(flops, tmp_path):
    with pytest.raises(ConfigError) as caught:
        advise(write_comparison(tmp_path).config, tmp_path, flops, (1e-3, -1e-3, math.nan, 1e-3))
    problems = caught.value.problems
    assert {problem.where for problem in problems} == {"--flops", "--lr"} and len(problems) == 4
    assert "-0.001" in [problem.found for problem in problems]


def test_probes_need_held_out_text_and_no_fit_lag(tmp_path):
    config = write_comparison(tmp_path).config
    wrong = replace(config, data=replace(config.data, valid=()), fit=replace(config.fit, lag="there"))
    with pytest.raises(ConfigError) as caught:
        advise(wrong, tmp_path, 1e12, (1e-3,))
    assert {"data.valid", "fit.lag"} <= {problem.where for problem in caught.value.problems}
