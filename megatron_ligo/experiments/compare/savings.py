"""Statistics of a comparison: FLOPs to a loss, savings, and paired differences. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import linear_regression, mean, stdev
from types import MappingProxyType

import numpy as np

# Student's t, two-sided 95%, by degrees of freedom from 1. Beyond the end, the last value applies: it is never too low.
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

REACHED, BELOW, NEVER = "reached", "below at the smallest budget", "not reached"
LOWER, HIGHER, TIE, UNKNOWN = "lower", "higher", "tie", "one seed: no verdict"


@dataclass(frozen=True)
class Crossing:
    """flops: interpolated if REACHED; the smallest budget, an upper bound, if BELOW; None if NEVER."""

    kind: str
    flops: float | None


def crossing(points: Sequence[tuple[float, float]], target: float, linear: bool = False) -> Crossing:
    """Finds the FLOPs at which (FLOPs, loss) points reach a target loss.

    Interpolates linearly in log FLOPs between two points, which are the ends of separate runs; linear: in FLOPs, along
    one run from 0 on. Never extrapolates.
    """
    points = sorted(points)
    if not points:
        return Crossing(NEVER, None)
    if points[0][1] <= target:
        return Crossing(BELOW, points[0][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 <= target:
            share = (y0 - target) / (y0 - y1)
            if linear:
                return Crossing(REACHED, x0 + share * (x1 - x0))
            return Crossing(REACHED, math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))))
    return Crossing(NEVER, None)


@dataclass(frozen=True)
class Saving:
    """1 - FLOPs / scratch's FLOPs, at scratch's final loss. kinds: the kind of crossing on each seed."""

    kinds: tuple[str, ...]
    shares: tuple[float, ...]  # of the seeds that reached the loss
    seeds: int  # expected
    partial: int  # seeds with a missing run
    reach: float  # share of scratch's FLOPs covered by every seed that never reached the loss

    @property
    def summary(self) -> str:
        if not self.kinds:
            return "no runs to compare"
        few = f", {len(self.kinds)} of {self.seeds} seeds compared" if len(self.kinds) < self.seeds else ""
        few += f", runs missing on {self.partial}" if self.partial else ""
        if NEVER in self.kinds:
            count = f"{self.kinds.count(NEVER)} of {len(self.kinds)} seeds"
            return f"not reached on {count} within {self.reach:.2g} of scratch's FLOPs{few}"
        bound = "at least " if BELOW in self.kinds else ""
        low, high = min(self.shares), max(self.shares)
        spread = f" ({low:.0%} to {high:.0%})" if len(self.shares) > 1 else "" if few else " (one seed)"
        return f"{bound}{mean(self.shares):.0%}{spread}{few}"


def saving(
    arm: dict[int, list[tuple[float, float]]],
    scratch: dict[int, tuple[float, float]],
    source: float = 0.0,
    seeds: int = 0,
    budgets: int = 0,
) -> Saving:
    """Computes an arm's saving over scratch.

    arm: points by seed; scratch: (FLOPs, loss) at full budget by seed; source: FLOPs added to the arm's; seeds,
    budgets: the expected numbers of each.
    """
    kinds, shares, ends, partial = [], [], [], 0
    for seed, (whole, target) in scratch.items():
        if seed not in arm:
            continue
        reached = crossing(arm[seed], target)
        kinds.append(reached.kind)
        partial += len(arm[seed]) < budgets
        if reached.flops is not None:
            shares.append(1 - (reached.flops + source) / whole)
        else:
            ends.append((max(flops for flops, _ in arm[seed]) + source) / whole)
    return Saving(tuple(kinds), tuple(shares), seeds, partial, min(ends, default=0.0))


def trend(means: Mapping[float, float]) -> float | None:
    """Returns the slope of differences by budget over the budget's base-2 logarithm; None for a single budget.

    A gap that decays with the budget has the opposite sign of its differences.
    """
    if len(means) < 2:
        return None
    doublings = [math.log2(budget) for budget in means]
    return linear_regression(doublings, list(means.values())).slope


SampleLosses = Mapping[int, Sequence[float]]  # by seed: the loss on each held-out sample
DRAWS = 4000


@dataclass(frozen=True)
class Difference:
    """Mean paired difference of losses. low, high: its 95% interval (None with one seed).

    The interval is the wider one on either side of two: Student's over seeds, which misses the chance in the choice of
    the text, and, where losses by sample are given, a bootstrap of seeds and samples, which has too few seeds.
    """

    seeds: int
    mean: float
    low: float | None
    high: float | None
    verdict: str


def difference(
    ours: dict[int, float],
    theirs: dict[int, float],
    our_samples: SampleLosses = MappingProxyType({}),
    their_samples: SampleLosses = MappingProxyType({}),
) -> Difference | None:
    """Pairs two arms' losses by seed, which fixes the data order. Returns None if they share no seed.

    our_samples, their_samples: losses on the same held-out samples; unused unless every shared seed has them.
    """
    seeds = [seed for seed in ours if seed in theirs]
    pairs = [ours[seed] - theirs[seed] for seed in seeds]
    if not pairs:
        return None
    middle = mean(pairs)
    if len(pairs) == 1:
        return Difference(1, middle, None, None, UNKNOWN)
    t = T_95[min(len(pairs) - 1, len(T_95)) - 1]
    half = t * stdev(pairs) / math.sqrt(len(pairs))
    low, high = middle - half, middle + half
    if all(our_samples.get(seed) and their_samples.get(seed) for seed in seeds):
        gaps = np.array([np.subtract(our_samples[seed], their_samples[seed]) for seed in seeds])
        drawn = bootstrap_interval(gaps)
        low, high = min(low, drawn[0]), max(high, drawn[1])
    verdict = TIE if low <= 0 <= high else LOWER if middle < 0 else HIGHER
    return Difference(len(pairs), middle, low, high, verdict)


def bootstrap_interval(gaps: np.ndarray) -> tuple[float, float]:
    """Returns the 95% interval of the mean when rows and columns of `gaps` are drawn again, independently.

    gaps: [seeds, samples]. A drawn sample is drawn for all seeds: they share the text. The draws are the same in each
    call.
    """
    random = np.random.default_rng(0)
    rows, columns = (random.multinomial(size, np.full(size, 1 / size), DRAWS) / size for size in gaps.shape)
    means = ((rows @ gaps) * columns).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
