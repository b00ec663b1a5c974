"""Finds anomalies in a run's losses, gradient norms and update sizes: plain numbers in, plain numbers out.

Losses are compared on a logarithmic scale with a robust window (medians over recent steps), and with levels that
only ever fall: the lowest smoothed training loss and the lowest held-out loss. So a slow climb is measured from where
it began. A limit above a level is a part of the distance between the level and the loss of a uniform guess: how much
of what was learned may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

# Steps in the window of deviations; below MIN_HISTORY of them no deviation is known. A spike is measured from the
# median of the last MIN_HISTORY.
WINDOW, MIN_HISTORY = 50, 10
# The smoothed loss is the median of this many losses.
SMOOTHING = 20
# Smallest deviation of the logarithm of a loss: rounding to bf16 alone is 0.4 %. Without a history, bounds of it.
MIN_DEVIATION, FIRST_DEVIATIONS = 0.02, (0.06, 0.1)
MAD_TO_DEVIATION = 1.4826
# Parts of the distance to a uniform guess: what one step, the smoothed loss and the held-out loss may lose.
SPIKE_PART, CLIMB_PART, HELD_OUT_PART = 0.25, 0.15, 0.5
# What is reported without a reaction: a spike of this many deviations, and these parts.
NOTICED_DEVIATIONS, NOTICED_CLIMB_PART, NOTICED_HELD_OUT_PART = 6.0, 0.08, 0.15
# A level near a uniform guess, or above it, is measured by this fraction of itself.
MIN_DISTANCE = 0.5
# Deviations of single losses that the smoothed loss must also exceed: a level is the luckiest stretch of a noisy curve.
CLIMB_DEVIATIONS = 3.0
# The first level is the median of the first losses, but at most this multiple of the very first, before any update.
MAX_FIRST_RISE = 1.25
# A start whose loss is this multiple of a uniform guess's is reported.
BAD_START = 1.5
# Multiples of the median norm: reported, and severe. Clipping bounds the step, so norms vary widely in sound runs.
NOTICED_NORM, SEVERE_NORM = 10.0, 100.0
MIN_NORM_DEVIATION = 0.1
# An update larger than this many times the weights leaves nothing of them.
MAX_UPDATE = 3.0

LOSS, CLIMB, NORM, UPDATE, HELD_OUT = "loss", "smoothed loss", "gradient norm", "update", "held-out loss"


@dataclass(frozen=True)
class Anomaly:
    """One number beyond its limit. severe: the run must react; otherwise it is only reported."""

    kind: str
    value: float
    limit: float
    severe: bool

    @property
    def expected(self) -> str:
        return f"{self.kind} at most {self.limit:.4g}"

    @property
    def found(self) -> str:
        return f"{self.value:.4g}"


@dataclass(frozen=True)
class StepNumbers:
    """A step's loss, gradient norm before clipping, and size of the update relative to the weights (None: unknown)."""

    loss: float
    grad_norm: float
    update_ratio: float | None = None


class AnomalyDetector:
    """Judges each step before its update from the steps accepted so far.

    guess_loss: the loss of a uniform guess, in nats: ln of the number of classes. deviations: a loss so many deviations
    above the median is a severe spike. state: JSON values, changed in place, that a run saves with its checkpoints.
    """

    def __init__(self, guess_loss: float, deviations: float, state: dict):
        self.deviations = deviations
        self.state = state
        for name in ("losses", "norms", "updates"):
            state.setdefault(name, [])
        # level: lowest smoothed training loss. held_out: lowest held-out loss. guess: highest sensible loss.
        for name, value in (("level", None), ("held_out", None), ("guess", guess_loss)):
            state.setdefault(name, value)

    def check(self, numbers: StepNumbers) -> Anomaly | None:
        """Returns the gravest anomaly of a step that is not applied yet; changes nothing. The numbers are finite."""
        center, deviation = self._log_window("losses", MIN_DEVIATION)
        candidates = (
            self._check_loss(numbers.loss, center, deviation),
            self._check_climb(numbers.loss, deviation),
            self._check_size(NORM, "norms", numbers.grad_norm, math.inf),
            self._check_size(UPDATE, "updates", numbers.update_ratio, MAX_UPDATE),
        )
        anomalies = [anomaly for anomaly in candidates if anomaly]
        return max(anomalies, key=lambda anomaly: anomaly.severe, default=None)

    def accept(self, numbers: StepNumbers) -> None:
        """Adds a step whose update is applied."""
        state = self.state
        state["guess"] = max(state["guess"], numbers.loss) if not state["losses"] else state["guess"]
        values = {"losses": numbers.loss, "norms": numbers.grad_norm, "updates": numbers.update_ratio}
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                state[name] = [*state[name], value][-WINDOW:]
        if state["level"] is None:
            # No update has changed the weights of the first step: its loss is that of the start.
            state["level"] = numbers.loss
        elif len(state["losses"]) >= MIN_HISTORY:
            highest = state["level"] * (MAX_FIRST_RISE if len(state["losses"]) == MIN_HISTORY else 1.0)
            state["level"] = min(highest, median(state["losses"][-SMOOTHING:]))

    def record_evaluation(self, loss: float) -> Anomaly | None:
        """Adds a held-out loss; returns its anomaly, if it is one."""
        best = self.state["held_out"]
        if best is None or loss < best:
            self.state["held_out"] = loss
            return None
        severe, noticed = self._above(best, HELD_OUT_PART), self._above(best, NOTICED_HELD_OUT_PART)
        if not loss <= noticed:
            is_severe = not loss <= severe
            return Anomaly(HELD_OUT, loss, severe if is_severe else noticed, is_severe)
        return None

    def restart(self) -> None:
        """Forgets levels and windows: the next step is the first one of a new level."""
        self.state.update(losses=[], norms=[], updates=[], level=None, held_out=None)

    def replay(self, rows: Iterable[Mapping]) -> None:
        """Rebuilds the state from the rows of metrics.jsonl."""
        for row in rows:
            if row.get("start_eval_loss") is not None:
                self.record_evaluation(row["start_eval_loss"])
            if row.get("loss") is not None and row.get("grad_norm") is not None and not row.get("skipped"):
                self.accept(StepNumbers(row["loss"], row["grad_norm"], row.get("update_ratio")))
            if row.get("eval_loss") is not None:
                self.record_evaluation(row["eval_loss"])

    def has_recovered(self) -> bool:
        """True if the smoothed loss is back near its level."""
        losses, level = self.state["losses"], self.state["level"]
        is_known = level is not None and len(losses) >= SMOOTHING
        return is_known and median(losses[-SMOOTHING:]) <= self._above(level, NOTICED_CLIMB_PART)

    def _check_loss(self, loss: float, center: float, deviation: float) -> Anomaly | None:
        level = self.state["level"]
        if level is None:
            limit = BAD_START * self.state["guess"]
            return Anomaly(LOSS, loss, limit, False) if loss > limit else None
        limit = max(math.exp(center + self.deviations * deviation), self._above(level, SPIKE_PART))
        if loss > limit:
            return Anomaly(LOSS, loss, limit, True)
        noticed = math.exp(center + min(self.deviations, NOTICED_DEVIATIONS) * deviation)
        return Anomaly(LOSS, loss, noticed, False) if loss > noticed else None

    def _check_climb(self, loss: float, deviation: float) -> Anomaly | None:
        losses, level = self.state["losses"], self.state["level"]
        if level is None or len(losses) < MIN_HISTORY:
            return None
        smoothed = median([*losses, loss][-SMOOTHING:])
        noise = level * math.exp(CLIMB_DEVIATIONS * deviation)
        severe, noticed = (max(noise, self._above(level, part)) for part in (CLIMB_PART, NOTICED_CLIMB_PART))
        if smoothed > noticed:
            is_severe = smoothed > severe
            return Anomaly(CLIMB, smoothed, severe if is_severe else noticed, is_severe)
        return None

    def _check_size(self, kind: str, name: str, value: float | None, maximum: float) -> Anomaly | None:
        if value is None:
            return None
        if value > maximum:
            return Anomaly(kind, value, maximum, True)
        history = self.state[name]
        middle = median(history) if len(history) >= MIN_HISTORY else 0.0
        if not middle or value <= NOTICED_NORM * middle:
            return None
        center, deviation = self._log_window(name, MIN_NORM_DEVIATION)
        noticed = max(NOTICED_NORM * middle, math.exp(center + NOTICED_DEVIATIONS * deviation))
        severe = max(SEVERE_NORM * middle, math.exp(center + self.deviations * deviation))
        if value > noticed:
            return Anomaly(kind, value, severe if value > severe else noticed, value > severe)
        return None

    def _log_window(self, name: str, minimum: float) -> tuple[float, float]:
        """Returns recent median and deviation of the logarithms in a window. A short one is centred on the level."""
        values = self.state[name]
        if len(values) < MIN_HISTORY:
            lowest, highest = FIRST_DEVIATIONS
            spread = _deviation([_log(value) for value in values])
            return _log(self.state["level"] or 0.0), min(max(lowest, spread), highest)
        logs = [_log(value) for value in values]
        # The last few follow a curve that falls fast.
        return median(logs[-MIN_HISTORY:]), max(minimum, _deviation(logs))

    def _above(self, level: float, part: float) -> float:
        """Returns the limit that leaves a part of the distance between a level and a uniform guess."""
        return level + part * max(self.state["guess"] - level, MIN_DISTANCE * level)


def _log(value: float) -> float:
    return math.log(max(value, 1e-12))


def _deviation(logs: list[float]) -> float:
    """Returns the deviation of one value from a curve: by the differences of neighbours, which no trend inflates."""
    steps = [abs(after - before) for before, after in pairwise(logs)]
    return MAD_TO_DEVIATION * median(steps) / math.sqrt(2) if steps else 0.0
