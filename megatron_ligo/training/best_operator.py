"""The best that a fit has come to so far, by its held-out loss: what is kept, and when it is time to stop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ligo.config.run_config import FitSection


class BestOperator:
    """Goes with the run's state, so that a resumed run knows it too; every rank sees the same losses.

    A fit that never gets below where it began leaves the step at 0, the initialisation. save: writes the operator as it
    stands into a folder (collective); the best one is there until a better one takes its place.
    """

    def __init__(self, fit: FitSection, folder: Path, state: dict, save: Callable[[Path], None]):
        self.fit, self.folder, self.save = fit, folder, save
        self.state = state.setdefault("best", {"step": 0, "loss": state["losses"]["start"], "worse": 0})

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def loss(self) -> float:
        return self.state["loss"]

    def record_evaluation(self, step: int, loss: float) -> None:
        """Takes note of an evaluation after so many steps."""
        if loss < self.loss:
            self.state.update(step=step, loss=loss, worse=0)
            if self.fit.keep == "best":
                self.save(self.folder)
        elif step > self.step:
            self.state["worse"] += 1

    def should_stop(self) -> bool:
        return 0 < self.fit.patience <= self.state["worse"]
