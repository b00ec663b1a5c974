"""Replays the metrics.jsonl of runs through the loss guard: which steps it would report, and which it would stop at.

A severe step is refused, as in a run that skips: its loss enters no level, so that one cause may count many times. Of
runs that went well, what is severe is a false alarm.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_ligo.config.run_config import TrainingSection
from megatron_ligo.export.metrics_rows import ACCEPTED_CHANGES, METRICS_FILE, read_metrics
from megatron_ligo.training.guard.anomaly_detector import Anomaly, AnomalyDetector, StepNumbers

HELP = "guard: the steps of ended runs at which the loss guard would stop, and those that it would report"
MAX_LISTED = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=f"folders of runs, or their {METRICS_FILE}")
    parser.add_argument(
        "--classes", type=int, required=True, metavar="N", help="size of the vocabulary, or number of classes"
    )
    parser.add_argument(
        "--spike",
        type=float,
        default=TrainingSection.spike,
        metavar="X",
        help="as in configs (default: %(default)s)",
    )


def measure(args: argparse.Namespace, folder: Path) -> dict:
    runs = {}
    for run in args.runs:
        rows = read_metrics(run / METRICS_FILE if run.is_dir() else run)
        anomalies = list(replay(rows, math.log(args.classes), args.spike))
        severe = [(step, anomaly.kind) for step, anomaly in anomalies if anomaly.severe]
        runs[str(run)] = {
            "steps": sum(row.get("loss") is not None for row in rows),
            "severe": severe,
            "reported": [(step, anomaly.kind) for step, anomaly in anomalies if not anomaly.severe],
        }
    return {"what": "guard", "classes": args.classes, "spike": args.spike, "runs": runs}


def replay(rows: Iterable[Mapping], guess_loss: float, spike: float) -> Iterable[tuple[int, Anomaly]]:
    """Yields step and anomaly for the rows of one metrics.jsonl. guess_loss: of a uniform guess, in nats."""
    detector = AnomalyDetector(guess_loss, spike, {})
    for row in rows:
        if row.get(ACCEPTED_CHANGES):
            detector.restart()
        anomalies = [_evaluate(detector, row.get("start_eval_loss"))]
        if row.get("loss") is not None and row.get("grad_norm") is not None:
            numbers = StepNumbers(row["loss"], row["grad_norm"], row.get("update_ratio"))
            anomaly = detector.check(numbers)
            if not (anomaly and anomaly.severe):
                detector.accept(numbers)
            anomalies.append(anomaly)
        anomalies.append(_evaluate(detector, row.get("eval_loss")))
        yield from ((row["step"], anomaly) for anomaly in anomalies if anomaly)


def _evaluate(detector: AnomalyDetector, loss: float | None) -> Anomaly | None:
    return None if loss is None else detector.record_evaluation(loss)


def format_text(results: dict) -> str:
    lines = [f"{'steps':>8} {'severe':>7} {'reported':>9}  run"]
    for run, counts in results["runs"].items():
        lines.append(f"{counts['steps']:>8} {len(counts['severe']):>7} {len(counts['reported']):>9}  {run}")
        for kind, steps in (("severe", counts["severe"]), ("reported", counts["reported"])):
            if steps:
                by_kind = ", ".join(f"{name} {n}" for name, n in Counter(name for _, name in steps).items())
                listed = ", ".join(str(step) for step, _ in steps[:MAX_LISTED])
                lines.append(f"{'':>28}{kind}: {by_kind}; steps {listed}{' ...' if len(steps) > MAX_LISTED else ''}")
    total = {key: sum(len(counts[key]) for counts in results["runs"].values()) for key in ("severe", "reported")}
    steps = sum(counts["steps"] for counts in results["runs"].values())
    lines.append(f"{steps:>8} {total['severe']:>7} {total['reported']:>9}  in all")
    return "\n".join(lines)
