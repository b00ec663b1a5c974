"""Made-up loss curves: sound ones, on which a guard must be silent, and bad ones, with the step where they turn bad."""

from __future__ import annotations

import numpy as np

from megatron_ligo.training.guard.anomaly_detector import Anomaly, AnomalyDetector, StepNumbers

STEPS = 400
SOUND = ("power law", "plateau", "warm-up", "drop at the end", "bf16", "harder data", "overfitted", "grown", "epochs")


def sound_curve(kind: str, guess: float, floor: float, noise: float, generator: np.random.Generator) -> np.ndarray:
    """Returns the losses, (STEPS,), of a run that goes well. noise: deviation of the logarithm of one loss."""
    steps = np.arange(STEPS)
    level = floor + (guess - floor) * (1 + steps / 30) ** -0.6
    if kind == "plateau":
        level = np.full(STEPS, guess)
    elif kind == "warm-up":
        # The loss first rises a little, as under a learning rate that is still too high for fresh weights.
        level = level * (1 + 0.08 * np.exp(-(((steps - 12) / 6) ** 2)))
    elif kind == "drop at the end":
        level = level - 0.3 * (level - 0.5 * floor) * np.clip((steps - 300) / 100, 0, 1)
    elif kind == "harder data":
        level = level + 0.05 * (guess - level) * (steps > 200)
    elif kind == "overfitted":
        level = guess * np.exp(-steps / 60) + 0.01
    elif kind == "grown":
        level = np.full(STEPS, floor) * (1 - 0.1 * steps / STEPS)
    elif kind == "epochs":
        level = level * 0.93 ** (steps // 100)
    losses = level * np.exp(noise * generator.standard_normal(STEPS))
    # bf16 has 8 significant bits.
    return np.round(losses * 2.0**6) / 2.0**6 if kind == "bf16" else losses


def judge(losses: np.ndarray, guess: float, state: dict | None = None) -> list[tuple[int, Anomaly]]:
    """Returns the anomalies of a curve; severe ones are not accepted, as in a run that skips them."""
    detector = AnomalyDetector(guess, 10.0, {} if state is None else state)
    anomalies = []
    for step, loss in enumerate(losses):
        numbers = StepNumbers(float(loss), 1.0)
        anomaly = detector.check(numbers)
        if anomaly:
            anomalies.append((step, anomaly))
        if not (anomaly and anomaly.severe):
            detector.accept(numbers)
    return anomalies


def severe_steps(losses: np.ndarray, guess: float) -> list[int]:
    return [step for step, anomaly in judge(losses, guess) if anomaly.severe]
