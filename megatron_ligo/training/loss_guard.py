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
MAX_CONSECUTIVE = 10
MAX_LISTED = 8


class LossGuard:
    """Stops at a bad step, or counts it and goes on, as the run's settings say. state["skipped"]: steps not applied."""

    def __init__(self, engine: Engine, run: TrainingSection, state: dict):
        self.engine, self.run = engine, run
        self.skipped: list[int] = state.setdefault("skipped", [])
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def check_step(self, step: int, loss: float, batches: list[Batch], samples: list[range]) -> None:
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
        if self.skipped[-MAX_CONSECUTIVE:] == list(range(last - MAX_CONSECUTIVE + 1, last + 1)):
            raise NumbersError(
                f"{MAX_CONSECUTIVE} steps in a row were not finite: more than the data can be the reason."
            )

    def _origin(self, batches: list[Batch], samples: list[range]) -> str:
        """The samples and the parameters that it comes from: the step is taken again, and looked at."""
        if not self.engine.refused:
            return ""
        losses, names = self.engine.rerun_refused_step(batches)
        bad = [part for part, loss in zip(samples, losses, strict=False) if not math.isfinite(loss)]
        everyone = all_ranks().all_gather(([number for part in bad for number in part], names))
        numbers = sorted({number for numbers, _ in everyone for number in numbers})
        rows = list(dict.fromkeys(name for _, names in everyone for name in names))
        of_samples = f"; not finite the losses of training samples {_format_items(numbers)}" if numbers else ""
        return f"{of_samples}; not finite the gradients of {_format_items(rows)}"


def _format_items(items: list) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(map(str, items[:MAX_LISTED])) + more
