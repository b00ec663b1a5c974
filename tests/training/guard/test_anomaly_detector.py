"""The guard's judgement on made-up curves: silent on sound ones, in time on bad ones, the same after a restart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_ligo.training.guard.anomaly_detector import (
    CLIMB,
    CLIMB_PART,
    HELD_OUT,
    LOSS,
    MAX_UPDATE,
    NORM,
    UPDATE,
    AnomalyDetector,
    StepNumbers,
)
from tests.training.guard.made_up_curves import SOUND, STEPS, judge, severe_steps, sound_curve

# Shrinking a failing curve takes minutes and says nothing more.
PHASES = (Phase.explicit, Phase.generate)
SEEDS = st.integers(0, 2**31)
GUESS = st.sampled_from([math.log(10), math.log(300), math.log(50257), math.log(128256)])
FLOOR, NOISE = st.floats(0.1, 0.6), st.floats(0.0, 0.15)


@pytest.mark.parametrize("kind", SOUND)
@settings(max_examples=12, deadline=None, derandomize=True, phases=PHASES)
@given(seed=SEEDS, guess=GUESS, floor=FLOOR, noise=NOISE)
def test_a_sound_curve_stops_nothing(kind, seed, guess, floor, noise):
    losses = sound_curve(kind, guess, floor * guess, noise, np.random.default_rng(seed))
    assert severe_steps(losses, guess) == []


@settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@given(seed=SEEDS, guess=GUESS, floor=st.floats(0.1, 0.4), noise=st.floats(0.0, 0.05), at=st.integers(60, STEPS - 1))
def test_a_spike_is_found_at_its_step_and_only_there(seed, guess, floor, noise, at):
    losses = sound_curve("grown", guess, floor * guess, noise, np.random.default_rng(seed))
    losses[at] += 0.5 * (guess - losses[at]) + 0.5 * losses[at]
    assert severe_steps(losses, guess) == [at]


@settings(max_examples=25, deadline=None, derandomize=True, phases=PHASES)
@given(seed=SEEDS, guess=GUESS, floor=st.floats(0.1, 0.5), noise=st.floats(0.0, 0.04), rate=st.floats(3e-3, 0.2))
def test_a_climb_is_found_before_it_has_lost_much(seed, guess, floor, noise, rate):
    """However slow: what it climbs from is the level, which does not climb."""
    generator = np.random.default_rng(seed)
    losses = sound_curve("grown", guess, floor * guess, noise, generator)[:100]
    climb = losses[-20:].mean() * np.exp(rate * np.arange(1000)) * np.exp(noise * generator.standard_normal(1000))
    steps = severe_steps(np.concatenate([losses, np.minimum(climb, 1.5 * guess)]), guess)
    assert steps, "not found"
    distance = max(guess - floor * guess, 0.5 * floor * guess)
    reached = climb[steps[0] - 100] - floor * guess
    # The smoothed loss lags by ten steps behind a fast climb.
    assert reached < 0.65 * distance or steps[0] < 110


def test_a_climb_is_not_followed_by_its_own_limit():
    losses = np.concatenate([np.full(100, 2.5), 2.5 * np.exp(1e-4 * np.arange(20_000))])
    anomalies = judge(losses, math.log(50257))
    first = next(anomaly for _, anomaly in anomalies if anomaly.severe)
    assert first.kind == CLIMB
    assert first.limit == pytest.approx(2.5 + CLIMB_PART * (math.log(50257) - 2.5))
    assert not anomalies[0][1].severe, "half of it is reported first"


def test_the_first_losses_are_judged_too():
    assert severe_steps(np.array([5.7, 168.0]), math.log(300)) == [1]
    assert severe_steps(np.array([2.5, 2.6, 7.0]), math.log(50257)) == [2]
    climbing = np.array([5.7 + 0.4 * step for step in range(40)])
    assert severe_steps(climbing, math.log(300))[0] < 16
    # Nothing has changed the weights of a first step: a bad start is reported, and no reason to stop.
    (step, anomaly), *_ = judge(np.array([168.0, 150.0]), math.log(300))
    assert (step, anomaly.kind, anomaly.severe) == (0, LOSS, False)


def check_after(history: StepNumbers, step: StepNumbers, clip: int = 30):
    detector = AnomalyDetector(10.0, 10.0, {})
    for _ in range(clip):
        detector.accept(history)
    return detector.check(step)


def test_gradient_norms_and_updates():
    usual = StepNumbers(3.0, 0.5, 1e-3)
    assert check_after(usual, StepNumbers(3.0, 4.0, 1e-3)) is None
    noticed, severe = (check_after(usual, StepNumbers(3.0, norm, 1e-3)) for norm in (7.0, 70.0))
    assert (noticed.kind, noticed.severe, severe.kind, severe.severe) == (NORM, False, NORM, True)
    first = AnomalyDetector(10.0, 10.0, {}).check(StepNumbers(5.7, 1.0, 30.0))
    assert (first.kind, first.severe, first.limit) == (UPDATE, True, MAX_UPDATE)
    assert check_after(usual, StepNumbers(3.0, 0.5, 0.2)).kind == UPDATE
    assert check_after(StepNumbers(3.0, 0.0, 0.0), StepNumbers(3.0, 1.0, 0.1)) is None


def test_held_out_losses():
    detector = AnomalyDetector(10.0, 10.0, {})
    assert [detector.record_evaluation(loss) for loss in (4.0, 3.0, 3.5)] == [None] * 3
    noticed, severe = detector.record_evaluation(4.5), detector.record_evaluation(7.0)
    assert (noticed.kind, noticed.severe, severe.severe) == (HELD_OUT, False, True)
    assert detector.state["held_out"] == 3.0
    rebuilt = AnomalyDetector(10.0, 10.0, {})
    rebuilt.replay([{"loss": 3.0, "grad_norm": 1.0, "start_eval_loss": 3.0}])
    assert rebuilt.state["held_out"] == 3.0


@settings(max_examples=15, deadline=None, derandomize=True, phases=PHASES)
@given(seed=SEEDS, noise=NOISE, cut=st.integers(0, 200))
def test_a_restart_forgets_nothing(seed, noise, cut):
    """By the state in a checkpoint and by the rows of metrics.jsonl, the same to the last bit."""
    guess = math.log(50257)
    losses = sound_curve("power law", guess, 2.5, noise, np.random.default_rng(seed))[:220]
    whole = AnomalyDetector(guess, 10.0, {})
    for loss in losses:
        whole.accept(StepNumbers(float(loss), 1.0, 1e-3))
    saved: dict = {}
    judge(losses[:0], guess, saved)
    before = AnomalyDetector(guess, 10.0, saved)
    rows = [{"loss": float(loss), "grad_norm": 1.0, "update_ratio": 1e-3} for loss in losses]
    before.replay(rows[:cut])
    after = AnomalyDetector(guess, 10.0, json.loads(json.dumps(saved)))
    bad_rows = [{"loss": None, "grad_norm": None}, {"loss": 99.0, "grad_norm": 1.0, "skipped": 1}]
    after.replay([*rows[cut:], *bad_rows])
    assert after.state == whole.state
