"""Tracks a fit's best operator by held-out loss: which operator to keep, and when to stop early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.config.run_config import FitSection
from megatron_ligo.growth.operator_file import OperatorFile


class BestOperator:
    """Keeps the lowest held-out loss in the run's state, so that a resumed run continues with it.

    Step 0 is the initialisation, which stays the best until a step improves on it. save: writes the current operator
    into a folder (collective). Every rank must record the same losses.
    """

    def __init__(self, section: FitSection, folder: Path, state: dict, save: Callable[[Path], None]):
        self.section, self.folder, self.save = section, folder, save
        self.state = state.setdefault("best", {"step": 0, "loss": state["losses"]["start"], "worse": 0})

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def loss(self) -> float:
        return self.state["loss"]

    def record_evaluation(self, step: int, loss: float) -> None:
        """Records the held-out loss after `step` steps and saves the operator if it is the best."""
        if loss < self.loss:
            self.state.update(step=step, loss=loss, worse=0)
            if self.section.keep == "best":
                self.save(self.folder)
        elif step > self.step:
            self.state["worse"] += 1

    def read(self) -> OperatorFile:
        """Opens the best operator. CheckpointError if the folder holds that of another step."""
        operator = OperatorFile(self.folder)
        step = operator.record.get("step")
        if step != self.step:
            hint = "A run at another layout has replaced it. Fit again, or set fit.keep = 'last'."
            raise CheckpointError(Problem(f"{self.folder}", f"the operator of step {self.step}", f"step {step}", hint))
        return operator

    def should_stop(self) -> bool:
        """Returns True after `patience` evaluations in a row without improvement."""
        return 0 < self.section.patience <= self.state["worse"]
