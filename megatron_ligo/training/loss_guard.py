"""Looks at each step's numbers: what is not finite never reaches the weights, and the run says where it came from."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median

from megatron_ligo.common.errors import NumbersError, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.training.engine import Batch, Engine

log = logging.getLogger(__name__)

# A loss is held against the median of so many before it.
WINDOW = 20
# More bad steps than this in a row are no accident of the data.
IN_A_ROW = 10
SHOWN = 8


class LossGuard:
    """Stops at a bad step, or counts it and goes on, as the run's settings say. state["skipped"]: steps not applied."""

    def __init__(self, engine: Engine, run: TrainingSection, state: dict):
        self.engine, self.run = engine, run
        self.skipped: list[int] = state.setdefault("skipped", [])
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, loss: float, batches: list[Batch], samples: list[range]) -> None:
        """After step `step` (from 0) over `batches`, which hold those samples. NumbersError if the run is to stop.

        Collective; the loss is the same on all ranks.
        """
        where = f"step {step + 1}"
        if self.engine.refused or not math.isfinite(loss):
            self.skipped.append(step + 1)
            found = f"loss {loss}{self._origin(batches, samples)}"
            self._tell(Problem(where, "a finite loss and finite gradients", found))
            self._check_row(step + 1)
            return
        if len(self.losses) == WINDOW and self.run.spike and loss > self.run.spike * median(self.losses):
            self._tell(Problem(where, f"a loss like those before, {median(self.losses):.4g}", f"{loss:.4g}"))
        self.losses.append(loss)

    def _tell(self, text: str) -> None:
        if self.run.bad_numbers == "stop":
            hint = "Nothing of it is saved. Look at the data, lower lr, or set bad_numbers = 'skip'."
            raise NumbersError(f"{text} {hint}")
        log.warning("%s", text)

    def _check_row(self, last: int) -> None:
        if self.skipped[-IN_A_ROW:] == list(range(last - IN_A_ROW + 1, last + 1)):
            raise NumbersError(f"{IN_A_ROW} steps in a row were not finite: more than the data can be the reason.")

    def _origin(self, batches: list[Batch], samples: list[range]) -> str:
        """The samples and the parameters that it comes from: the step is taken again, and looked at."""
        if not self.engine.refused:
            return ""
        losses, names = self.engine.look_again(batches)
        bad = [part for part, loss in zip(samples, losses, strict=False) if not math.isfinite(loss)]
        everyone = all_ranks().all_gather(([number for part in bad for number in part], names))
        numbers = sorted({number for numbers, _ in everyone for number in numbers})
        rows = list(dict.fromkeys(name for _, names in everyone for name in names))
        of_samples = f"; not finite the losses of training samples {_few(numbers)}" if numbers else ""
        return f"{of_samples}; not finite the gradients of {_few(rows)}"


def _few(items: list) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
