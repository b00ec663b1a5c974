"""Reads the records of fits, hand-offs and pretraining runs into one form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import CheckpointError, ConfigError, ErrorCollector, LigoError
from megatron_ligo.config.run_config import SCRATCH
from megatron_ligo.export import provenance
from megatron_ligo.export.metrics_rows import METRICS_FILE, read_metrics
from megatron_ligo.export.provenance import PRETRAIN_RECORD
from megatron_ligo.growth.operator_file import RECORD as OPERATOR_RECORD
from megatron_ligo.report.anomaly_notes import describe_anomalies
from megatron_ligo.report.json_fields import JsonRecord, load_record
from megatron_ligo.report.routing_notes import describe_routing

# Keys of the operator's record that growth.json does not repeat.
OPERATOR_ONLY_KEYS = ("small", "large", "settings")

# Notes on a run.
UNFINISHED = "it has not finished: its record is not written yet"
FIT_NOT_GIVEN = "its fit's folder is not among the given folders: the FLOPs of the fit are not included"
REUSES_FIT_SAMPLES = "it trains on samples that its fit has read (same data and order): compare held-out losses only"
FIT_ON_OTHER_SAMPLES = "its fit was evaluated on other samples: its row omits the fit's losses"


@dataclass(frozen=True)
class EvaluationSet:
    """The held-out samples that losses were measured on, identified by the digest of their tokens and labels."""

    samples: int
    digest: str
    seq_length: int | None = field(compare=False, default=None)


@dataclass(frozen=True)
class RecordedRun:
    """One run's folder. None stands for values that were not recorded.

    losses: nats per token on `evaluation_set`, by key: "initialised" and "fitted" (the large model after its named
    initialisation, and after the fit), "step 0" and "end" (of a pretraining run). metrics: the rows of metrics.jsonl,
    whose tokens, flops and seconds are totals. peak_memory: bytes of the fullest rank. prior_flops: FLOPs of the fit
    behind a pretraining run's start (0: none). handoff_losses: on the fit's own batch, (loss at the end of the fit,
    loss at step 0). deviation: standard deviation of the last held-out loss over the samples.
    """

    name: str
    folder: Path
    kind: str
    model_config: ModelConfig | None = None
    initialised_by: str | None = None
    evaluation_set: EvaluationSet | None = None
    losses: dict[str, float] = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    peak_memory: float | None = None
    layout: dict | None = None
    precision: str | None = None
    prior_flops: float | None = 0
    handoff_losses: tuple[float, float] | None = None
    deviation: float | None = None
    notes: tuple[str, ...] = ()
    record: dict = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0

    def total(self, key: str) -> float | None:
        return self.metrics[-1].get(key) if self.metrics else None

    @property
    def parameters(self) -> int | None:
        if self.model_config is None:
            return None
        arch = architectures.get(self.model_config.arch)
        return sum(prod(arch.param(key).shape(self.model_config)) for key in arch.keys(self.model_config))


def read_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """Reads the runs in the given order. Raises CheckpointError with every error of every folder."""
    errors = ErrorCollector("report", CheckpointError)
    paths = [Path(folder).resolve() for folder in folders]
    for path in {path for path in paths if paths.count(path) > 1}:
        errors.add(f"{path}", "each folder once", f"{paths.count(path)} times")
    runs = [run for run in (_read_run(path, errors) for path in paths) if run is not None]
    errors.raise_if_any()
    runs = [replace(run, notes=run.notes + describe_anomalies(run.folder, run.metrics, errors)) for run in runs]
    runs = [replace(run, notes=run.notes + describe_routing(run.metrics)) for run in runs]
    runs = _make_names_unique(runs)
    linked = [_link_to_handoff(run, runs, errors) if run.kind == "pretraining" else run for run in runs]
    errors.raise_if_any()
    return linked


def _make_names_unique(runs: list[RecordedRun]) -> list[RecordedRun]:
    """Prepends the parent folder to names that occur more than once."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.folder.parent.name}/{run.name}") if names.count(run.name) > 1 else run for run in runs
    ]


def _read_run(folder: Path, errors: ErrorCollector) -> RecordedRun | None:
    if not folder.is_dir():
        errors.add(f"{folder}", "the folder of a run", "nothing" if not folder.exists() else "a file")
        return None
    before = len(errors.problems)
    metrics = _read_metrics(folder / METRICS_FILE, errors)
    pretrain = load_record(folder / PRETRAIN_RECORD, errors)
    if pretrain:
        return _read_pretraining(folder, pretrain, metrics, errors)
    fit = load_record(folder / "operator" / OPERATOR_RECORD, errors)
    if fit:
        return _read_fit(folder, fit, metrics, errors)
    if (folder / provenance.RECORD_NAME).is_file():
        return _read_handoff(folder, errors)
    if not metrics and len(errors.problems) == before:
        expected = f"{METRICS_FILE}, {PRETRAIN_RECORD}, operator/{OPERATOR_RECORD} or {provenance.RECORD_NAME}"
        errors.add(f"{folder}", expected, "none of these", "Give the --output folder of fit, grow or pretrain.")
    return RecordedRun(folder.name, folder, "unfinished", metrics=metrics, prior_flops=None, notes=(UNFINISHED,))


def _read_metrics(path: Path, errors: ErrorCollector) -> list[dict]:
    if not path.is_file():
        return []
    try:
        rows = read_metrics(path)
    except LigoError as error:
        errors.add_message(f"{error}")
        return []
    except UnicodeDecodeError as error:
        errors.add(f"{path}", "UTF-8 text", f"{error}")
        return []
    for number, row in enumerate(rows, 1):
        line = JsonRecord(Path(f"{path}, line {number}"), row, errors)
        for key in ("step", "flops", "seconds", "tokens"):
            if line.number(key) is None and not (key in row and row[key] is not None):
                errors.add(f"{line.path}: {key}", "a number", "none")
        for key in ("loss", "eval_loss"):
            line.number(key)
        if len(errors.problems) > 10:
            break
    return rows


def _read_fit(folder: Path, record: JsonRecord, metrics: list[dict], errors: ErrorCollector) -> RecordedRun:
    losses = {"initialised": record.number("losses", "start"), "fitted": record.number("losses", "end")}
    model_config = _parse_model_config(record, "large")
    return RecordedRun(
        folder.name,
        folder,
        "fit",
        model_config=model_config,
        initialised_by=_describe_initialisation(record.table("settings")),
        evaluation_set=_parse_evaluation_set(record, model_config, record.count("config", "data", "seq_length")),
        losses=_drop_missing(losses),
        metrics=metrics,
        peak_memory=_read_peak_memory(record),
        layout=record.table("layout"),
        precision=record.text("config", "fit", "precision"),
        record=record.fields,
    )


def _read_handoff(folder: Path, errors: ErrorCollector) -> RecordedRun | None:
    try:
        record = JsonRecord(folder / provenance.RECORD_NAME, provenance.read(folder), errors)
    except LigoError as error:
        errors.add_message(f"{error}")
        return None
    losses = {"initialised": record.number("fit", "losses", "start"), "fitted": record.number("fit", "losses", "end")}
    model_config = _parse_model_config(record, "large")
    return RecordedRun(
        folder.name,
        folder,
        "hand-off",
        model_config=model_config,
        initialised_by=_describe_operator(record),
        evaluation_set=_parse_evaluation_set(
            record, model_config, record.count("fit", "config", "data", "seq_length"), "fit"
        ),
        losses=_drop_missing(losses),
        record=record.fields,
    )


def _read_pretraining(folder: Path, record: JsonRecord, metrics: list[dict], errors: ErrorCollector) -> RecordedRun:
    losses = {"step 0": record.number("losses", "start"), "end": record.number("losses", "end")}
    fitted, again = record.number("losses", "fit"), record.number("losses", "start_on_fit_batch")
    start = record.text("run", "pretrain", "start")
    model_config = _parse_model_config(record, "dims")
    return RecordedRun(
        folder.name,
        folder,
        "pretraining",
        model_config=model_config,
        initialised_by=Path(start).name if start and start != SCRATCH else "fresh weights",
        evaluation_set=_parse_evaluation_set(record, model_config, record.count("run", "data", "seq_length")),
        losses=_drop_missing(losses),
        metrics=metrics,
        peak_memory=_read_peak_memory(record),
        layout=record.table("layout"),
        precision=record.text("run", "pretrain", "precision"),
        handoff_losses=None if fitted is None or again is None else (fitted, again),
        deviation=record.number("deviation"),
        record=record.fields,
    )


def _link_to_handoff(run: RecordedRun, runs: Sequence[RecordedRun], errors: ErrorCollector) -> RecordedRun:
    """Adds to a pretraining run its hand-off's name, the fit's losses on the same samples, and the fit's FLOPs."""
    start = JsonRecord(run.folder / PRETRAIN_RECORD, run.record, errors).text("run", "pretrain", "start")
    if not start or start == SCRATCH:
        return run
    handoff = _find_handoff(Path(start), runs, errors)
    if handoff is None:
        if Path(start).exists() and run.handoff_losses is None:
            return run
        note = f"its start {start} is not among the given folders"
        return replace(run, prior_flops=None, notes=(*run.notes, note))
    initialised_by = f"{handoff.name} ({handoff.initialised_by})"
    fit = handoff.record.get("fit")
    if not fit:
        # Nothing was learned between the initialisation and step 0: they share one loss.
        initialised = {"initialised": run.losses["step 0"]} if "step 0" in run.losses else {}
        return replace(run, initialised_by=initialised_by, losses={**run.losses, **initialised})
    source = next((other for other in runs if other.kind == "fit" and _is_same_fit(other.record, fit)), None)
    notes = run.notes
    prior_flops = source.total("flops") if source else fit.get("flops")
    if not isinstance(prior_flops, int | float):
        notes, prior_flops = (*notes, FIT_NOT_GIVEN), None
    if _data_order(run.record.get("run")) == _data_order(fit.get("config")) and _first_sample(run) < _samples_read(fit):
        notes += (REUSES_FIT_SAMPLES,)
    losses = run.losses
    if handoff.evaluation_set and handoff.evaluation_set == run.evaluation_set:
        losses = {**handoff.losses, **run.losses}
    elif handoff.losses:
        notes += (FIT_ON_OTHER_SAMPLES,)
    return replace(run, initialised_by=initialised_by, losses=losses, prior_flops=prior_flops, notes=notes)


def _find_handoff(start: Path, runs: Sequence[RecordedRun], errors: ErrorCollector) -> RecordedRun | None:
    """Finds the hand-off at a path: among the runs by its path, then by its name, then on disk.

    The name identifies a hand-off whose path was recorded on another machine or in another working folder.
    """
    handoffs = [run for run in runs if run.kind == "hand-off"]
    for handoff in handoffs:
        if handoff.folder == start.resolve():
            return handoff
    for handoff in handoffs:
        if handoff.name == start.name:
            return handoff
    return _read_handoff(start.resolve(), errors) if (start / provenance.RECORD_NAME).is_file() else None


def _data_order(config: dict | None) -> dict | None:
    """Returns the settings that determine the order of training samples."""
    data = (config or {}).get("data")
    return {key: data.get(key) for key in ("train", "seq_length", "seed")} if data else None


def _first_sample(pretraining: RecordedRun) -> float:
    """Returns the index of the first training sample of a pretraining run."""
    return ((pretraining.record.get("run") or {}).get("pretrain") or {}).get("first_sample", 0)


def _samples_read(fit: dict) -> float:
    """Returns the number of training samples that a fit has read."""
    settings = fit["config"].get("fit") or {}
    return fit.get("step", math.inf) * settings.get("global_batch_size", math.inf)


def _is_same_fit(operator: dict, fit: dict) -> bool:
    """Tells whether a hand-off's fit is that of an operator's record. Compares JSON text, in which NaN equals NaN."""
    own = {key: value for key, value in operator.items() if key not in OPERATOR_ONLY_KEYS}
    return json.dumps(own, sort_keys=True) == json.dumps(fit, sort_keys=True)


def _parse_model_config(record: JsonRecord, key: str) -> ModelConfig | None:
    sizes = record.table(key)
    try:
        return None if sizes is None else ModelConfig.from_json(sizes)
    except ConfigError as error:
        record.errors.add_message(f"{record.path}: {key}: {error}")
        return None


def _parse_evaluation_set(
    record: JsonRecord, model_config: ModelConfig | None, seq_length: int | None, *where: str
) -> EvaluationSet | None:
    samples, digest = record.count(*where, "eval", "samples"), record.text(*where, "eval", "digest")
    if samples is None or digest is None:
        return None
    if seq_length is None:
        return EvaluationSet(samples, digest)
    return EvaluationSet(
        samples,
        digest,
        seq_length if model_config is None else model_config.tokens_per_sample(seq_length),
    )


def _read_peak_memory(record: JsonRecord) -> float | None:
    return max(record.numbers("peak_memory_bytes") or [], default=None)


def _drop_missing(losses: dict[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in losses.items() if value is not None}


def _describe_initialisation(settings: dict | None) -> str | None:
    """Formats width / depth initialisation and noise in the config's words. A table by space shows its default."""
    if not settings:
        return None
    width, depth, noise = (_describe_setting(settings.get(key)) for key in ("width_init", "depth_init", "noise"))
    name = f"{width}" if width == depth else f"{width} / {depth}"
    options = [f"{key} {settings[key]}" for key in ("fresh", "borrow") if settings.get(key) not in (None, "none")]
    return ", ".join([name, *([f"noise {noise}"] if noise else []), *options])


def _describe_setting(value: object) -> object:
    return f"{value.get('default')} and others" if isinstance(value, dict) else value


def _describe_operator(record: JsonRecord) -> str | None:
    name = _describe_initialisation(record.table("operator", "settings"))
    step = record.number("fit", "step")
    return name if name is None or step is None else f"{name}, fitted {step:g} steps"
