"""Advice from made-up probes: scratch that wins, ties, and diverged probes."""

import math
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.advise import advise, candidates, choose_rounds, probe_comparison, rank_probes
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
    arms = [Arm(name, replace(config, operator=replace(config.operator, method=name))) for name in METHODS]
    spec = probe_comparison(config, arms, (1e-3,), lag=100)
    plan: ComparisonPlan = MadeUpRuns(folder, end).plan(spec)
    small: ModelConfig = read_model_config(Path(config.small.path))
    return rank_probes(plan, small, {}, fit)


def plan_step(folder: Path) -> int:
    spec = write_comparison(folder)
    return MadeUpRuns(folder, lambda name: 1.0).plan(spec).step_flops


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
    assert record["flops"] == (3 + 3 * 2) * 100 * plan_step(tmp_path)


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


def test_many_candidates_are_halved_and_probed_longer(tmp_path):
    """Ten candidates: the better half goes on, at twice the length; a start that leads only at first is left behind."""
    config: RunConfig = write_comparison(tmp_path).config
    names, rates = [f"start_{number}" for number in range(5)], (1e-3, 2e-3)
    early = {name: 5.0 + number / 10 for number, name in enumerate(names)}

    def end(name: str) -> float | None:
        arm, _, run = name.split("/")
        if arm == "scratch":
            return 7.0
        if arm == "start_4":
            return None
        # The worst of those that are left at half of the last length wins at the end.
        return (early[arm] if "_0.25_" in run or "_0.5_" in run else 10 - early[arm]) + float(run.rpartition("_")[2])

    made_up = MadeUpRuns(tmp_path, end)
    plan = made_up.plan(probe_comparison(config, [Arm(name, config) for name in names], rates, lag=80))
    record = rank_probes(plan, read_model_config(Path(config.small.path)), {}, False, rounds=3)
    first, second = record["rounds"]
    assert [first["steps"], second["steps"], record["lag_steps"]] == [20, 40, 80]
    assert [(row["method"], row["lr"]) for row in first["dropped"] if row["loss"]] == [
        ("start_2", 2e-3), ("start_3", 1e-3), ("start_3", 2e-3),
    ]  # fmt: skip
    assert {row["method"] for row in first["dropped"] if row["loss"] is None} == {"start_4"}
    assert [(row["method"], row["lr"]) for row in second["dropped"]] == [("start_1", 2e-3), ("start_2", 1e-3)]
    assert [row["method"] for row in record["ranking"]] == ["start_1", "start_0"]
    assert record["refused"] == {"start_4": "it diverged"}
    probes = [name for name in made_up.jobs if "/run_" in name and not name.startswith("scratch")]
    assert len(probes) == 10 + 5 + 3 + 2
    # Scratch is probed at both rates once, then at its best.
    assert sum(name.startswith("scratch") for name in made_up.jobs) == 4


@pytest.mark.parametrize(
    ("steps", "rounds", "first"), [(10 * (26 + 2 + 2), 1, 10), (1440, 4, 10), (1439, 3, 14), (2880, 4, 20)]
)
def test_as_many_rounds_as_the_budget_pays_for(steps, rounds, first):
    """13 methods at two rates and scratch: 26, 13, 7 and 4 probes of 1, 2, 4 and 8 times the first length."""
    assert choose_rounds(steps, 13, 2, fit=False) == (rounds, first)
    with pytest.raises(ConfigError, match="30 probes of 10 steps"):
        choose_rounds(299, 13, 2, fit=False)
    with pytest.raises(ConfigError, match=r"--minutes: expected at least 110: .* found 105, enough for 299 steps"):
        choose_rounds(299, 13, 2, fit=False, price=0.35, unit="minutes")


def test_values_of_a_key_are_candidates(tmp_path):
    config: RunConfig = write_comparison(tmp_path).config
    small = read_model_config(Path(config.small.path))
    arms, refused = candidates(config, small, ["corner", "stack"], {"fresh_scale": [0.5, 2]})
    assert [arm.name for arm in arms] == ["corner,fresh_scale=0.5", "corner,fresh_scale=2"]
    assert [arm.config.operator.fresh_scale for arm in arms] == [0.5, 2]
    assert set(refused) == {"stack,fresh_scale=0.5", "stack,fresh_scale=2"}
    plan = MadeUpRuns(tmp_path, lambda name: float("=2" not in name)).plan(probe_comparison(config, arms, (1e-3,), 100))
    record = rank_probes(plan, small, refused, False)
    assert record["advice"][0].startswith("Use method = 'corner' fresh_scale = 2 with a peak")
    pasted = RunConfig.from_dict(tomllib.loads(record["toml"]))
    assert (pasted.operator.method, pasted.operator.fresh_scale) == ("corner", 2)


def test_missing_data_and_a_layout_that_does_not_fit_are_refused_before_anything_runs(tmp_path):
    config = write_comparison(tmp_path).config
    with pytest.raises(ConfigError) as caught:
        advise(config, tmp_path / "out", 1e12, (1e-3,))
    assert {problem.where for problem in caught.value.problems} == {"data.train", "data.valid"}
    for name in ("train", "valid"):
        (tmp_path / f"{name}.idx").touch()
    paths = {name: (f"{tmp_path / name}",) for name in ("train", "valid")}
    layout = replace(config.pretrain, parallel=replace(config.pretrain.parallel, tp=3))
    config = replace(config, data=replace(config.data, **paths), pretrain=layout)
    with pytest.raises(ConfigError, match="tp = 3"):
        advise(config, tmp_path / "out", 1e12, (1e-3,), launcher="torchrun")
