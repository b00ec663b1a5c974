"""Looks at each step's numbers: what is not finite never reaches the weights, and the run says where it came from."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median

from megatron_ligo.config import TrainingSection
from megatron_ligo.errors import NumbersError, message
from megatron_ligo.parallel.mesh import gathered
from megatron_ligo.training.engine import Batch, Engine

log = logging.getLogger(__name__)

# A loss is held against the median of so many before it.
WINDOW = 20
# More bad steps than this in a row are no accident of the data.
IN_A_ROW = 10
SHOWN = 8


class Guard:
    """Stops at a bad step, or counts it and goes on, as the run's settings say. state["skipped"]: steps not applied."""

    def __init__(self, engine: Engine, run: TrainingSection, state: dict):
        self.engine, self.run = engine, run
        self.skipped: list[int] = state.setdefault("skipped", [])
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def look(self, step: int, loss: float, batches: list[Batch]) -> None:
        """After step `step` (from 0) over `batches`. NumbersError on all ranks if the run is to stop."""
        if self.engine.refused or not math.isfinite(loss):
            self._bad(step, loss, batches)
        elif self._spike(loss):
            self._tell(
                message(f"step {step + 1}", f"a loss like those before, {median(self.losses):.4g}", f"{loss:.4g}")
            )
        else:
            self.losses.append(loss)

    def _spike(self, loss: float) -> bool:
        full = len(self.losses) == WINDOW
        return bool(self.run.spike) and full and loss > self.run.spike * median(self.losses)

    def _bad(self, step: int, loss: float, batches: list[Batch]) -> None:
        where = _where(self.engine, step, self.run, batches) if self.engine.refused else "finite gradients"
        self.skipped.append(step + 1)
        self._tell(message(f"step {step + 1}", "a finite loss and finite gradients", f"loss {loss}; {where}"))
        row = range(step + 1, step + 1 - IN_A_ROW, -1)
        if all(number in self.skipped for number in row):
            raise NumbersError(f"{IN_A_ROW} steps in a row were not finite: more than the data can be the reason.")

    def _tell(self, text: str) -> None:
        if self.run.bad_numbers == "stop":
            raise NumbersError(
                f"{text} Its update is not saved. Look at that batch, lower lr, or set bad_numbers = 'skip'."
            )
        log.warning("%s", text)


def _where(engine: Engine, step: int, run: TrainingSection, batches: list[Batch]) -> str:
    """The samples and the parameters that the numbers come from. Collective: the step is taken again, and looked at."""
    mesh = engine.mesh
    losses, names = engine.look_again(batches)
    first = step * run.global_batch_size
    samples = []
    for index, loss in enumerate(losses):
        if not math.isfinite(loss):
            start = first + (index * mesh.dp + mesh.dp_rank) * run.micro_batch_size
            samples += range(start, start + run.micro_batch_size)
    found = gathered((samples, names))
    bad = sorted({sample for samples, _ in found for sample in samples})
    rows = list(dict.fromkeys(name for _, names in found for name in names))
    return f"training samples {_few(bad)}; gradients of {_few(rows)}"


def _few(items: list) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return (", ".join(map(str, items[:SHOWN])) or "none alone") + more
