"""Checks the loss and gradients of every step. A non-finite step is not applied, and its cause is reported."""

from __future__ import annotations

import logging
import math
from collections import deque
from statistics import median

from megatron_ligo.common.errors import NumbersError, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.data.sampler import Batch
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.training.engine import Engine

log = logging.getLogger(__name__)

# A loss is compared with the median of this many losses before it.
WINDOW = 20
# This many consecutive bad steps cannot come from the data alone.
MAX_CONSECUTIVE = 10
MAX_LISTED = 8


class LossGuard:
    """Stops at a bad step, or logs it and continues, as `bad_numbers` says. state["skipped"]: steps not applied."""

    def __init__(self, engine: Engine, section: TrainingSection, state: dict):
        self.engine, self.section = engine, section
        self.skipped: list[int] = state.setdefault("skipped", [])
        self.losses: deque[float] = deque(maxlen=WINDOW)

    def check_step(self, step: int, loss: float, batches: list[Batch], samples: list[range]) -> None:
        """Checks step `step` (from 0). NumbersError if the run must stop.

        loss: the same on all ranks. samples: the sample numbers of each of this rank's micro-batches. Collective.
        """
        where = f"step {step + 1}"
        if self.engine.step_refused or not math.isfinite(loss):
            self.skipped.append(step + 1)
            found = f"loss {loss}{self._describe_cause(batches, samples)}"
            self._report(Problem(where, "a finite loss and finite gradients", found))
            self._check_consecutive(step + 1)
            return
        spike = self.section.spike
        if len(self.losses) == WINDOW and spike and loss > spike * median(self.losses):
            self._report(Problem(where, f"a loss near those before, {median(self.losses):.4g}", f"{loss:.4g}"))
        self.losses.append(loss)

    def _report(self, problem: Problem) -> None:
        if self.section.bad_numbers == "stop":
            hint = "Nothing of this step is saved. Check the data, lower lr, or set bad_numbers = 'skip'."
            raise NumbersError(f"{problem} {hint}")
        log.warning("%s", problem)

    def _check_consecutive(self, last: int) -> None:
        if self.skipped[-MAX_CONSECUTIVE:] == list(range(last - MAX_CONSECUTIVE + 1, last + 1)):
            raise NumbersError(f"{MAX_CONSECUTIVE} steps in a row were not finite: the data cannot be the only cause.")

    def _describe_cause(self, batches: list[Batch], samples: list[range]) -> str:
        """Reruns a refused step and names the samples and the parameters that are not finite. Collective."""
        if not self.engine.step_refused:
            return ""
        losses, names = self.engine.rerun_refused_step(batches)
        bad_samples = [
            number
            for numbers, loss in zip(samples, losses, strict=False)
            if not math.isfinite(loss)
            for number in numbers
        ]
        gathered = all_ranks().all_gather((bad_samples, names))
        numbers = sorted({number for rank_numbers, _ in gathered for number in rank_numbers})
        parameters = list(dict.fromkeys(name for _, rank_names in gathered for name in rank_names))
        loss_text = f"; losses of training samples {_format_items(numbers)} are not finite" if numbers else ""
        return f"{loss_text}; gradients of {_format_items(parameters)} are not finite"


def _format_items(items: list) -> str:
    more = f" and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(map(str, items[:MAX_LISTED])) + more
