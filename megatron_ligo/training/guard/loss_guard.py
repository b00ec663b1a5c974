"""Checks the loss and gradients of every step before its update, and reacts as `bad_numbers` says.

stop: the run ends before the update. skip: the update is left out, a bounded number of times. warn: the update of a
finite step is applied. A step with non-finite numbers is never applied.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ligo.common.errors import LigoError, NumbersError, Problem
from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.data.sampler import Batch
from megatron_ligo.distributed.mesh import all_ranks
from megatron_ligo.export.metrics_rows import METRICS_FILE, read_metrics
from megatron_ligo.training.engine import Engine
from megatron_ligo.training.guard import stop_record
from megatron_ligo.training.guard.anomaly_detector import CLIMB, SMOOTHING, Anomaly, AnomalyDetector, StepNumbers
from megatron_ligo.training.guard.stop_record import FLAG
from megatron_ligo.training.guard.update_size import UpdateSize

log = logging.getLogger(__name__)

# More skipped steps in a row, or among so many steps, cannot come from single bad samples.
MAX_CONSECUTIVE = 10
MAX_SKIPPED, SKIP_WINDOW = 20, 500
MAX_LISTED = 8
STOP_HINT = "Nothing of this step is applied or saved. Check the data, lower lr, or set bad_numbers = 'skip'."
CLIMB_HINT = "Nothing of this step is applied or saved. Skipping steps does not help: check the data, or lower lr."
HELD_OUT_HINT = "Nothing since the last checkpoint is saved. Check the data, or lower lr."


@dataclass
class StepReport:
    """What the guard says of a step: columns of metrics.jsonl, the anomaly in words, the error that ends the run."""

    columns: dict[str, float] = field(default_factory=dict)
    anomaly: str | None = None
    error: NumbersError | None = None


class LossGuard:
    """Decides on each update. Every method is collective.

    state: the run's; the guard keeps "guard" and "skipped" (the steps that were not applied) there. guess_loss: the
    loss of a uniform guess, in nats. output: the run's folder. accepted_step: the last step at which the run had
    stopped and which its user has accepted since.
    """

    def __init__(
        self,
        engine: Engine,
        section: TrainingSection,
        state: dict,
        guess_loss: float,
        output: Path,
        accepted_step: int = 0,
    ):
        self.engine, self.section, self.output = engine, section, output
        self.accepted_step = accepted_step
        self.skipped: list[int] = state.setdefault("skipped", [])
        is_unknown = "guard" not in state and engine.steps > 0
        self.memory: dict = state.setdefault("guard", {})
        self.detector = AnomalyDetector(guess_loss, section.spike, self.memory.setdefault("detector", {}))
        update_state = self.memory.setdefault("update", {})
        self.update_size = UpdateSize(
            engine.engine.optimizer, engine.lr_scales, section.eps, section.betas, update_state
        )
        # Steps of anomalies after which weights were changed: the first since the loss was sound, None if it is again;
        # and the latest such step.
        for name in ("first_open", "latest"):
            self.memory.setdefault(name, None)
        # The last step of each kind of anomaly that was reported without a reaction.
        self.reported: dict[str, int] = self.memory.setdefault("reported", {})
        if is_unknown:
            self._rebuild(output / METRICS_FILE)
        self._anomaly: Anomaly | None = None
        self._numbers: StepNumbers | None = None
        engine.refuse_update = self._refuses_update

    def _rebuild(self, path: Path) -> None:
        """Rebuilds the memory of a checkpoint that has none from the rows of its steps in metrics.jsonl."""

        def replay() -> None:
            rows = read_metrics(path) if path.is_file() else []
            self.detector.replay(row for row in rows if row["step"] <= self.engine.steps)

        ranks = all_ranks()
        ranks.run_on_rank_0(replay)
        self.detector.state.update(ranks.all_gather(self.detector.state)[0])

    def _refuses_update(self, loss: float, grad_norm: float) -> bool:
        """Called before an update whose gradients are finite, with the same numbers on all ranks."""
        lr = self.engine.lr
        self._numbers = StepNumbers(loss, grad_norm, self.update_size.estimate(lr, grad_norm, self.section.clip))
        self._anomaly = None
        if not math.isfinite(loss):
            return True
        if not self.section.spike:
            return False
        self._anomaly = self.detector.check(self._numbers)
        return self._must_react(self._anomaly) and not self._passes(self.engine.steps + 1, self._anomaly)

    def _must_react(self, anomaly: Anomaly | None) -> bool:
        return anomaly is not None and anomaly.severe and self.section.bad_numbers != "warn"

    def _passes(self, done: int, anomaly: Anomaly) -> bool:
        """True if the user has accepted the step; steps before it that can be skipped are skipped again."""
        can_skip = self.section.bad_numbers == "skip" and anomaly.kind != CLIMB
        return done == self.accepted_step or (done < self.accepted_step and not can_skip)

    def begin_step(self) -> None:
        self._numbers = self._anomaly = None

    def check_step(self, step: int, loss: float, batches: list[Batch], samples: list[range]) -> StepReport:
        """Judges step `step` (from 0) after its update was applied or refused.

        loss: the same on all ranks. samples: the sample numbers of each of this rank's micro-batches.
        """
        done = step + 1
        report = StepReport()
        if self._numbers is not None and self._numbers.update_ratio is not None:
            report.columns["update_ratio"] = self._numbers.update_ratio
        if not self.engine.step_refused:
            self._record_applied(done, report)
        elif self._anomaly is not None:
            problem = Problem(f"step {done}", self._anomaly.expected, f"{self._anomaly.found}{self._describe_level()}")
            self._record_refused(done, problem, self._anomaly, report)
        else:
            found = f"loss {loss}{self._describe_cause(batches, samples)}"
            problem = Problem(f"step {done}", "a finite loss and finite gradients", found)
            self._record_refused(done, problem, None, report)
        return report

    def record_start(self, loss: float) -> None:
        """Takes the held-out loss before the first step for the level that later ones are measured from."""
        if math.isfinite(loss):
            self.detector.record_evaluation(loss)

    def record_evaluation(self, done: int, loss: float, report: StepReport) -> None:
        """Judges the held-out loss after `done` steps; a severe one ends the run before they are saved."""
        if not self.section.spike or not math.isfinite(loss):
            return
        anomaly = self.detector.record_evaluation(loss)
        if anomaly is None:
            return
        problem = Problem(f"after step {done}", anomaly.expected, anomaly.found)
        if self._must_react(anomaly) and done > self.accepted_step:
            report.anomaly = report.anomaly or str(problem)
            report.error = NumbersError(f"{problem} {HELD_OUT_HINT}")
            return
        if anomaly.severe and done <= self.accepted_step:
            self.detector.state["held_out"] = loss
        self._report(done, anomaly, problem, report)

    def stop(self, done: int, error: NumbersError) -> None:
        """Records why the run ends, and raises the error on all ranks."""
        try:
            all_ranks().run_on_rank_0(lambda: stop_record.write_stop(self.output, done, str(error)))
        except LigoError as failure:
            raise NumbersError(f"{error} It could not be recorded: {failure}") from None
        raise error

    def protected_steps(self, checkpoints: Sequence[int]) -> set[int]:
        """Returns the checkpoints that retention must keep: the newest from before the latest anomaly."""
        limit = self.memory["latest"]
        older = [step for step in checkpoints if limit is not None and step < limit]
        return {max(older)} if older else set()

    def _record_applied(self, done: int, report: StepReport) -> None:
        anomaly = self._anomaly
        if anomaly is not None:
            problem = Problem(f"step {done}", anomaly.expected, f"{anomaly.found}{self._describe_level()}")
            self._report(done, anomaly, problem, report)
            if anomaly.severe and done <= self.accepted_step:
                log.warning("step %d: accepted by %s; the losses from here on are a new level", done, FLAG)
                self.detector.restart()
        if self._numbers is not None and self.section.spike:
            self.detector.accept(self._numbers)
        self.update_size.measure_if_due(done)
        # The smoothed loss knows of an anomaly only some steps after it.
        is_calm = done - max(self.reported.values(), default=0) > SMOOTHING
        if is_calm and self.detector.has_recovered():
            self.memory["first_open"] = None

    def _report(self, done: int, anomaly: Anomaly, problem: Problem, report: StepReport) -> None:
        """Reports an anomaly whose step is applied: once, until its kind has not been seen for some steps."""
        last = self.reported.get(anomaly.kind)
        self.reported[anomaly.kind] = done
        if self.memory["first_open"] is None:
            self.memory.update(first_open=done, latest=done)
        if last is None or done - last > SMOOTHING:
            report.anomaly = report.anomaly or str(problem)
            log.warning("%s", problem)

    def _record_refused(self, done: int, problem: Problem, anomaly: Anomaly | None, report: StepReport) -> None:
        self.skipped.append(done)
        report.columns["skipped"] = 1
        report.anomaly = str(problem)
        log.warning("%s", problem)
        if done <= self.accepted_step:
            return
        if self.section.bad_numbers == "stop":
            report.error = NumbersError(f"{problem} {STOP_HINT}")
        elif anomaly is not None and anomaly.kind == CLIMB:
            report.error = NumbersError(f"{problem} {CLIMB_HINT}")
        elif self.skipped[-MAX_CONSECUTIVE:] == list(range(done - MAX_CONSECUTIVE + 1, done + 1)):
            text = f"{MAX_CONSECUTIVE} steps in a row were refused: the data cannot be the only cause."
            report.error = NumbersError(f"{text} The last: {problem}")
        elif (recent := sum(step > done - SKIP_WINDOW for step in self.skipped)) > MAX_SKIPPED:
            text = f"{recent} of the last {SKIP_WINDOW} steps were refused: the data cannot be the only cause."
            report.error = NumbersError(f"{text} The last: {problem}")

    def _describe_level(self) -> str:
        level, held_out = self.detector.state["level"], self.detector.state["held_out"]
        if level is None:
            return ""
        best = "" if held_out is None else f", lowest held-out loss {held_out:.4g}"
        return f" (lowest smoothed loss {level:.4g}{best})"

    def _describe_cause(self, batches: list[Batch], samples: list[range]) -> str:
        """Reruns a refused step and names the samples and the parameters that are not finite."""
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
