"""FLOPs to a loss, savings and ties, against answers worked out by hand."""

import math
from statistics import stdev

import numpy as np
import pytest

from megatron_ligo.experiments.compare.savings import (
    BELOW,
    HIGHER,
    LOWER,
    NEVER,
    REACHED,
    TIE,
    UNKNOWN,
    bootstrap_interval,
    crossing,
    difference,
    saving,
)


def test_a_crossing_is_read_off_in_log_flops():
    result = crossing([(400.0, 2.0), (100.0, 3.0)], 2.5)
    assert result.kind == REACHED and result.flops == pytest.approx(200.0)
    assert crossing([(100.0, 3.0), (400.0, 2.0)], 2.0).flops == pytest.approx(400.0)


def test_nothing_is_claimed_beyond_what_was_run():
    points = [(100.0, 3.0), (400.0, 2.0)]
    assert crossing(points, 1.9).kind == NEVER and crossing(points, 1.9).flops is None
    assert (crossing(points, 3.5).kind, crossing(points, 3.5).flops) == (BELOW, 100.0)
    assert crossing([], 1.0).kind == NEVER
    # The first time counts, whatever a longer run does.
    assert crossing([(100.0, 3.0), (200.0, 1.0), (400.0, 2.0)], 2.0).flops == pytest.approx(100 * math.sqrt(2))


def test_savings_are_paired_by_seed_and_told_as_bounds():
    scratch = {1: (1000.0, 2.0), 2: (1000.0, 2.5)}
    arm = {1: [(100.0, 3.0), (400.0, 2.0)], 2: [(100.0, 3.0), (400.0, 2.0)]}
    result = saving(arm, scratch)
    assert result.shares == pytest.approx((0.6, 0.8)) and result.summary == "70% (60% to 80%)"
    assert saving(arm, scratch, source=200.0).shares == pytest.approx((0.4, 0.6))
    assert saving({1: arm[1]}, scratch).summary == "60% (one seed)"
    assert saving(arm, {1: (1000.0, 3.5)}).summary == "at least 90% (one seed)"
    never = {1: (1000.0, 1.0), 2: (1000.0, 2.5)}
    assert saving(arm, never).summary == "not reached on 1 of 2 seeds within 0.4 of scratch's FLOPs"
    assert saving(arm, never, source=200.0).summary == "not reached on 1 of 2 seeds within 0.6 of scratch's FLOPs"
    assert saving({}, scratch).summary == "no runs to compare"


def test_seeds_and_runs_that_are_missing_are_counted():
    scratch = {1: (1000.0, 2.0), 2: (1000.0, 2.0), 3: (1000.0, 2.0)}
    whole = [(250.0, 1.9), (500.0, 1.8), (1000.0, 1.7)]
    arm = {1: whole, 2: whole, 3: whole[2:]}
    assert saving(arm, scratch, seeds=3, budgets=3).summary == "at least 50% (0% to 75%), runs missing on 1"
    assert saving(arm, {1: scratch[1]}, seeds=3, budgets=3).summary == "at least 75%, 1 of 3 seeds compared"
    never = {1: (1000.0, 1.0), 2: (1000.0, 1.0)}
    message = "not reached on 2 of 2 seeds within 1 of scratch's FLOPs, 2 of 3 seeds compared"
    assert saving(arm, never, seeds=3, budgets=3).summary == message


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [((2.0, 2.1, 2.2), LOWER), ((2.4, 2.51, 2.6), HIGHER), ((2.0, 2.5, 2.4), TIE), ((2.0,), UNKNOWN)],
)
def test_an_arm_is_better_only_beyond_the_spread_of_the_seeds(ours, verdict):
    theirs = {1: 2.3, 2: 2.41, 3: 2.5}
    assert difference(dict(enumerate(ours, 1)), theirs).verdict == verdict


def test_the_interval_is_student_s():
    result = difference({1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0})
    assert (result.low, result.high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)), rel=1e-3)
    assert difference({1: 1.0}, {2: 1.0}) is None


@pytest.mark.parametrize(("seeds", "t"), [(11, 2.228), (12, 2.201), (31, 2.042), (32, 2.042), (200, 2.042)])
def test_many_seeds_have_their_own_t(seeds, t):
    result = difference({seed: float(seed % 2) for seed in range(seeds)}, dict.fromkeys(range(seeds), 0.0))
    spread = stdev(float(seed % 2) for seed in range(seeds))
    assert result.high - result.mean == pytest.approx(t * spread / math.sqrt(seeds), rel=1e-6)


def test_the_choice_of_text_widens_an_interval():
    """Three seeds that agree to 1e-3 on eight samples, two of which make the whole difference."""
    gaps = {1: [0.0] * 6 + [-0.4, -0.4], 2: [0.0] * 6 + [-0.4, -0.392], 3: [0.0] * 6 + [-0.4, -0.408]}
    ours = {seed: math.fsum(each) / 8 for seed, each in gaps.items()}
    zeros = dict.fromkeys(gaps, [0.0] * 8)
    assert difference(ours, dict.fromkeys(gaps, 0.0)).verdict == LOWER
    widened = difference(ours, dict.fromkeys(gaps, 0.0), gaps, zeros)
    assert widened.verdict == TIE and widened.low < -0.2 and widened.mean == pytest.approx(-0.1)
    # A seed without losses by sample: the seeds' own interval is all there is.
    assert difference(ours, dict.fromkeys(gaps, 0.0), {1: gaps[1]}, zeros) == difference(ours, dict.fromkeys(gaps, 0.0))


def test_the_bootstrap_of_samples_has_their_standard_error():
    random = np.random.default_rng(1)
    text, seeds = random.normal(0.3, 0.1, 400), random.normal(0, 0.02, (50, 1))
    low, high = bootstrap_interval(text + seeds)
    error = math.hypot(text.std() / 20, seeds.std() / math.sqrt(50))
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (low + high) / 2 == pytest.approx((text + seeds).mean(), abs=2e-3)
    # Without text noise, the seeds' alone, and the other way round.
    low, high = bootstrap_interval(np.repeat(seeds, 400, axis=1))
    assert high - low == pytest.approx(2 * 1.96 * seeds.std() / math.sqrt(50), rel=0.06)
