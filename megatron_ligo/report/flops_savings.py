"""Savings: with how many FLOPs fewer a run reaches the final held-out loss of another, on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from megatron_ligo.report.run_records import RecordedRun


class FlopsSaving(NamedTuple):
    """`run` reaches `loss`, the last one of `reference`, at `flops` in place of `reference_flops`."""

    run: str
    reference: str
    loss: float
    flops: float
    reference_flops: float

    @property
    def part(self) -> float:
        """The saved part of the FLOPs."""
        return 1 - self.flops / self.reference_flops

    def __str__(self) -> str:
        return (
            f"{self.run} reaches {self.reference}'s last held-out loss, {self.loss:.4f}, with {self.flops:.3g} FLOPs "
            f"in place of {self.reference_flops:.3g}: {self.part:.0%} saved, the fit behind a start included"
        )


def find_savings(runs: Sequence[RecordedRun]) -> list[FlopsSaving]:
    """Compares pretraining runs with the one whose last held-out loss is the highest, among those of equal samples."""
    savings = []
    for evaluation_set in dict.fromkeys(run.evaluation_set for run in runs if run.evaluation_set):
        curves = {
            run.name: points
            for run in runs
            if run.evaluation_set == evaluation_set and run.kind != "fit" and run.prior_flops is not None
            if len(points := _held_out_points(run)) > 1
        }
        if len(curves) < 2:
            continue
        reference = max(curves, key=lambda name: curves[name][-1][1])
        reference_flops, loss = curves[reference][-1]
        for name, points in curves.items():
            flops = _first_crossing(points, loss)
            if name != reference and flops is not None and flops < reference_flops:
                savings.append(FlopsSaving(name, reference, loss, flops, reference_flops))
    return savings


def _held_out_points(run: RecordedRun) -> list[tuple[float, float]]:
    """Returns (FLOPs with those before the run, held-out loss) in order."""
    points = [(0.0, run.losses.get("step 0"))]
    points += [(row["flops"], row.get("eval_loss")) for row in run.metrics]
    if run.metrics and run.metrics[-1].get("eval_loss") is None:
        points.append((run.metrics[-1]["flops"], run.losses.get("end")))
    return [(flops + run.prior_flops, loss) for flops, loss in points if loss is not None and math.isfinite(loss)]


def _first_crossing(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Returns the FLOPs at which a curve first reaches a loss, between its points; None if it does not."""
    if points[0][1] <= loss:
        return points[0][0]
    for (before, high), (after, low) in pairwise(points):
        if low <= loss < high:
            return before + (after - before) * (high - loss) / (high - low)
    return None
