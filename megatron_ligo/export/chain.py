"""Walks what a run stands on: small model -> operator -> hand-off -> checkpoints, and the data, each by its digests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ligo.checkpoint import formats, manifest, model_record, run_record
from megatron_ligo.checkpoint.content import digest_state, digest_weights, find_damage
from megatron_ligo.checkpoint.formats.hf import config_json
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import AcceptedKeys
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import CheckpointError, LigoError, Problem
from megatron_ligo.common.file_digest import SEAL, hash_json, is_intact
from megatron_ligo.distributed.digest_cache import SAMPLED, WHOLE, DigestCache
from megatron_ligo.export import provenance, run_inputs
from megatron_ligo.export.grown_reader import GrownReader
from megatron_ligo.export.metrics_rows import METRICS_FILE, find_changed_rows
from megatron_ligo.export.provenance import PRETRAIN_RECORD
from megatron_ligo.export.start_check import find_checkpoint_damage, find_handoff_damage
from megatron_ligo.growth import operator_file

CHECKPOINTS, MODEL_FOLDER = "checkpoints", "model"
OPERATOR_FOLDERS = ("operator", "best")
# Runs lie at most this deep below the folder that is given: runs/CHAIN/STAGE/RUN.
MAX_DEPTH = 3


@dataclass
class ChainReport:
    """checked: what is as its record states, in order; notes: what could not be compared; problems: what differs."""

    checked: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_runs(folder: Path) -> list[Path]:
    """Returns the folders of fits, hand-offs, pretraining runs and single checkpoints of runs at or below `folder`."""
    return sorted(_walk(folder, MAX_DEPTH)) if folder.is_dir() else []


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif depth:
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _walk(Path(entry), depth - 1)


def _is_run(folder: Path) -> bool:
    operator = (f"operator/{operator_file.RECORD}", f"operator/{operator_file.TENSORS}")
    names = (PRETRAIN_RECORD, provenance.RECORD_NAME, run_record.RECORD, *operator)
    if _lacks_growth_record(folder):
        return True
    return any((folder / name).is_file() for name in names) or any(
        (folder / CHECKPOINTS).glob(f"*/{run_record.RECORD}")
    )


def _lacks_growth_record(folder: Path) -> bool:
    """True for a hand-off whose record is gone: one of its formats was written by growth."""
    if (folder / provenance.RECORD_NAME).is_file():
        return False
    for path in folder.glob(f"*/{manifest.MANIFEST}"):
        with suppress(LigoError):
            if manifest.load_manifest(path.parent).source.get("format") == GrownReader.format:
                return True
    return False


def verify_runs(folder: Path, cache: DigestCache) -> ChainReport:
    """Compares every record, file and input of the runs at or below a folder with the digests in their records.

    So it does with the runs and hand-offs that these started from, and with the operators beside those.
    """
    walk = _ChainWalk(cache)
    walk.pending = find_runs(folder)
    while walk.pending:
        walk.check_run(walk.pending.pop(0))
    walk.check_links()
    return walk.report


def find_changed_inputs(run: Path, cache: DigestCache) -> list[str]:
    """Returns a problem for each input of a finished fit or pretraining run that is not what the run has used.

    Its metrics, from which reports draw curves, are compared with what its last checkpoint states.
    """
    walk = _ChainWalk(cache)
    for path in (run / PRETRAIN_RECORD, run / "operator" / operator_file.RECORD):
        if path.is_file():
            walk.check_input_record(run, path)
    walk.check_metrics(run)
    return walk.report.problems


class _ChainWalk:
    def __init__(self, cache: DigestCache):
        self.cache = cache
        self.report = ChainReport()
        self.pending: list[Path] = []
        self._seen: set[Path] = set()
        self._operators: dict[Path, dict] = {}
        self._handoffs: dict[Path, dict] = {}
        self._compared: set[str] = set()

    def check_run(self, run: Path) -> None:
        """Checks a run, once. What it started from is pending afterwards."""
        if run.resolve() in self._seen:
            return
        self._seen.add(run.resolve())
        if _lacks_growth_record(run):
            self.report.problems.append(Problem(f"{run}", f"its {provenance.RECORD_NAME}", "none"))
        for name in OPERATOR_FOLDERS:
            if (run / name / operator_file.TENSORS).is_file() and not (run / name / operator_file.RECORD).is_file():
                self.report.problems.append(Problem(f"{run / name}", f"its {operator_file.RECORD}", "none"))
            if (run / name / operator_file.RECORD).is_file():
                self._try(run / name, lambda name=name: self._check_operator(run, run / name))
        if (run / provenance.RECORD_NAME).is_file():
            self._try(run, lambda: self._check_handoff(run))
        if (run / PRETRAIN_RECORD).is_file():
            self._try(run / PRETRAIN_RECORD, lambda: self._check_pretrain_record(run))
        folders = [path for path in (run / CHECKPOINTS).glob("step_*") if path.name.removeprefix("step_").isdigit()]
        checkpoints = sorted(path for path in folders if (path / run_record.RECORD).is_file())
        for folder in sorted(set(folders) - set(checkpoints)):
            # Checkpoints get their names only with their records.
            self.report.problems.append(Problem(f"{folder}", f"its {run_record.RECORD}", "none"))
        for checkpoint in [run, *checkpoints] if (run / run_record.RECORD).is_file() else checkpoints:
            self._try(checkpoint, lambda checkpoint=checkpoint: self._check_checkpoint(run, checkpoint))
        self.check_metrics(run)

    def check_input_record(self, run: Path, path: Path) -> None:
        self._try(path, lambda: self._check_inputs(run, run_inputs.read_inputs(_read_table(path), f"{path}")))

    def check_metrics(self, run: Path) -> None:
        """Compares the metrics of a run with its newest checkpoint."""
        records = [(_step(path.parent), path) for path in (run / CHECKPOINTS).glob(f"step_*/{run_record.RECORD}")]
        step, path = max(records, default=(0, None))
        if path is not None:
            self._try(
                run / METRICS_FILE, lambda: find_changed_rows(run, run_record.read_run_record(path)["state"], step)
            )

    def check_links(self) -> None:
        """Compares each hand-off with the operators beside it."""
        for folder, record in self._handoffs.items():
            stated = record.get("operator", {}).get(SEAL)
            beside = {path: own for path, own in self._operators.items() if path.parent.parent == folder.parent}
            if record.get("fit") is None or stated is None or not beside:
                continue
            if stated in [own.get(SEAL) for own in beside.values()]:
                self.report.checked.append(f"{folder}: grown by an operator beside it")
            else:
                names = ", ".join(map(str, beside))
                expected = f"one with the digest {stated}, by which {folder} was grown"
                self.report.problems.append(Problem(names, expected, "other operators"))

    def _try(self, place: Path, check) -> None:
        """Runs a check that returns problems; an error of its own is one too."""
        try:
            problems = check()
        except LigoError as error:
            problems = [str(error)]
        self.report.problems += [problem for problem in problems if problem not in self.report.problems]
        if not problems:
            self.report.checked.append(f"{place}: as its record states")

    def _check_operator(self, run: Path, folder: Path) -> list[str]:
        operator = operator_file.OperatorFile(folder)
        if operator.record["version"] == 1:
            self.report.notes.append(f"{folder}: written by an earlier version, without digests")
            return []
        operator.check_digest()
        self._operators[folder] = operator.record
        return self._check_inputs(run, run_inputs.read_inputs(operator.record, f"{folder / operator_file.RECORD}"))

    def _check_handoff(self, folder: Path) -> list[str]:
        record = provenance.read(folder)
        if record["version"] == 1:
            self.report.notes.append(f"{folder}: written by an earlier version, without digests")
        self._handoffs[folder] = record
        self.pending += _operator_runs_beside(folder, record)
        problems: list[str] = []
        for name in record["formats"]:
            if not (folder / name / manifest.MANIFEST).is_file():
                problems += [Problem(f"{folder / name}", "a manifest", "none")]
                continue
            problems += find_handoff_damage(folder, folder / name)
            problems += find_damage(folder / name, self.cache)
        where = f"{folder / provenance.RECORD_NAME}"
        fitted = run_inputs.read_inputs(record.get("fit") or {}, where)
        source = fitted.get(f"{run_inputs.SMALL_MODEL}: weights")
        grown_from = record.get("source", {}).get("digest")
        if source and grown_from != source["digest"] and not record.get("accepted_changes"):
            expected = f"weights of digest {source['digest']}, on which its operator was fitted"
            problems.append(Problem(f"{folder}: the small model", expected, grown_from))
        inputs = run_inputs.read_inputs(record, where) or fitted
        # The fit's sample indices lie in its own folder.
        inputs = {name: entry for name, entry in inputs.items() if entry["kind"] != run_inputs.INDICES}
        return problems + self._check_inputs(folder, inputs)

    def _check_pretrain_record(self, run: Path) -> list[str]:
        record = _read_table(run / PRETRAIN_RECORD)
        if SEAL not in record:
            self.report.notes.append(f"{run / PRETRAIN_RECORD}: written by an earlier version, without digests")
        elif not is_intact(record):
            return [Problem(f"{run / PRETRAIN_RECORD}", f"its own digest, {record[SEAL]}", "other content")]
        return self._check_inputs(run, run_inputs.read_inputs(record, f"{run / PRETRAIN_RECORD}"))

    def _check_checkpoint(self, run: Path, checkpoint: Path) -> list[str]:
        record = run_record.read_run_record(checkpoint / run_record.RECORD)
        if checkpoint != run:
            run_record.check_step(checkpoint, record, _step(checkpoint))
        problems = find_checkpoint_damage(checkpoint, self.cache)
        for path in sorted((run / MODEL_FOLDER).glob("*")):
            # The run copies these into each of its checkpoints.
            stated = record["files"].get(path.name)
            if stated is not None and stated != run_record.describe_file(path):
                problems.append(Problem(f"{path}", f"digest {stated['digest']}, as in {checkpoint}", "other content"))
        inputs = run_inputs.read_inputs(record["state"], f"{checkpoint / run_record.RECORD}")
        return [*problems, *self._check_inputs(run, inputs)]

    def _check_inputs(self, run: Path, inputs: dict) -> list[str]:
        """Compares what a run stands on with what is at its paths now; each input once."""
        problems = []
        for name, entry in inputs.items():
            path = _find_path(entry["path"], run)
            key = hash_json([str(path or entry["path"]), entry["kind"], entry["digest"]])
            if key in self._compared or entry["kind"] in (run_inputs.SAMPLES, run_inputs.VALUES):
                continue
            self._compared.add(key)
            if path is None:
                self.report.notes.append(f"{run}: {name}: {entry['path']} is not there: not compared")
                continue
            if entry["kind"] == run_inputs.STATE:
                self.pending += [place for place in (path, path.parent) if _is_run(place)][:1]
            if entry["kind"] == SAMPLED:
                note = f"{path} ({name}): only samples of it are bound; start the run with --full-check to bind all"
                self.report.notes.append(note)
            actual = self._digest(path, entry)
            if actual != entry["digest"]:
                expected = f"digest {entry['digest']}, as {run} used it"
                problems.append(Problem(f"{path} ({name})", expected, f"digest {actual}"))
        return problems

    def _digest(self, path: Path, entry: dict) -> str:
        kind = entry["kind"]
        if kind in (WHOLE, SAMPLED):
            return self.cache.digest_files({path: kind})[path]
        if kind == run_inputs.INDICES:
            files = self.cache.digest_folder(path)
            return hash_json(sorted(digest for name, digest in files.items() if name.endswith(".npy")))
        if kind == run_inputs.SIZES:
            return hash_json(_read_sizes(path, entry))
        source = open_input(path, entry)
        return digest_state(source, self.cache) if kind == run_inputs.STATE else digest_weights(source, self.cache)


def _step(folder: Path) -> int:
    """Returns the step of a checkpoint's folder; 0 for a damaged one that was moved aside."""
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdigit() else 0


def _operator_runs_beside(folder: Path, record: dict) -> list[Path]:
    """Returns the fits beside a hand-off whose operator has grown it, or, without one, those with a damaged record."""
    matching, damaged = [], []
    if record.get("fit") is None:
        return []
    for path in sorted(folder.absolute().parent.glob(f"*/operator/{operator_file.RECORD}")):
        try:
            operator = _read_table(path)
        except LigoError:
            operator = {}
        if operator and operator.get(SEAL) == record.get("operator", {}).get(SEAL):
            matching.append(path.parent.parent)
        elif not (operator and is_intact(operator)):
            damaged.append(path.parent.parent)
    return matching or damaged


def _read_table(path: Path) -> dict:
    """Reads a JSON object. CheckpointError for anything else."""
    try:
        record = read_json(path, finite=False)
    except ValueError as error:
        raise CheckpointError(Problem(f"{path}", "JSON", f"an error: {error}")) from None
    if not isinstance(record, dict):
        raise CheckpointError(Problem(f"{path}", "a JSON object", f"{record!r}"))
    return record


def open_input(path: Path, entry: dict) -> Reader:
    """Opens a model that a run stands on as the run did: a checkpoint, or the one that pretraining reads of a hand-off.

    Records of earlier versions do not state how; then its format is recognised.
    """
    record = provenance.read(path) if path.is_dir() else None
    format_name, accept = entry.get(run_inputs.FORMAT), entry.get(run_inputs.ACCEPT, ())
    if record is None:
        return formats.open(path, format_name if format_name in formats.formats() else None, accept)
    return formats.open(
        path / ("universal" if "universal" in record["formats"] else record["formats"][0]), None, accept
    )


def _read_sizes(path: Path, entry: dict) -> dict:
    accepted = AcceptedKeys(entry.get(run_inputs.ACCEPT, ()))
    if path.is_file() and path.suffix == ".json":
        return config_json.parse_model_config(config_json.load_config(path), f"{path}", accepted).to_json()
    if run_inputs.FORMAT not in entry and path.is_dir():
        record = model_record.find_record(path, accepted)
        if record:
            return record[0].to_json()
    return open_input(path, entry).model_config.to_json()


def _find_path(path: str, run: Path) -> Path | None:
    """Returns where a path of a run leads now: in the run, as it is, or seen from a folder above the run."""
    candidates = [run / path, Path(path), *(parent / path for parent in run.absolute().parents)]
    return next((candidate for candidate in candidates if _exists(candidate)), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A name longer than any file's, or a folder that may not be read.
        return False
