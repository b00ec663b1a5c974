"""Staged growth: a chain of trainings, fits and growths. Each is a separate command with its own parallel layout.

OUTPUT/NAME/{run.toml, fit, grown, pretrain}    the outputs of each stage's commands; an interrupted one resumes
OUTPUT/chain.json                               lineage: sizes, methods, tokens, FLOPs and losses of every run
OUTPUT/report                                   one page: loss against cumulative FLOPs since the first stage
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.common import signal_handling
from megatron_ligo.common.atomic_files import read_json, write_bytes, write_json
from megatron_ligo.common.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ErrorCollector,
    LigoError,
    Problem,
    Stopped,
    did_you_mean,
)
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.common.folder_kinds import CHAIN, check_output
from megatron_ligo.config.run_config import SCRATCH, RunConfig
from megatron_ligo.config.run_identity import CHANGEABLE_KEYS, add_differences, run_identity
from megatron_ligo.config.toml_tables import format_value, read_toml
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export import chain, provenance
from megatron_ligo.export.pretrain_record import read_pretrain_record
from megatron_ligo.export.provenance import PRETRAIN_RECORD
from megatron_ligo.export.run_inputs import ACCEPTED, describe_acceptance
from megatron_ligo.growth.operator_file import RECORD as OPERATOR_RECORD
from megatron_ligo.report import write_report
from megatron_ligo.report.run_records import RecordedRun, read_runs

RECORD, REPORT, STAGE_CONFIG = "chain.json", "report", "run.toml"
COMMANDS = "megatron_ligo"
ONE_PROCESS = (sys.executable, "-m", COMMANDS)
STAGE_KEYS = ("name", "launcher")
PR_SET_PDEATHSIG = 1


class StageTask(NamedTuple):
    """One command of a stage. name: its output folder within the stage's."""

    name: str
    command: list[str]
    is_done: bool


@dataclass(frozen=True)
class GrowthStage:
    """One model of the chain. previous: the stage whose model it grows; None for the first."""

    name: str
    folder: Path
    launcher: tuple[str, ...]
    config: RunConfig
    previous: GrowthStage | None

    @property
    def has_fit(self) -> bool:
        return self.previous is not None and self.config.fit.steps > 0

    def tasks(self) -> Iterator[StageTask]:
        """Yields the stage's commands in order."""
        if self.has_fit:
            operator_record = self.folder / "fit/operator" / OPERATOR_RECORD
            yield StageTask("fit", [*self._launcher, "fit"], operator_record.is_file())
        if self.previous:
            operator = ["--operator", str(self.folder / "fit/operator")] if self.has_fit else []
            is_done = (self.folder / "grown" / provenance.RECORD_NAME).is_file()
            yield StageTask("grown", [*ONE_PROCESS, "grow", *operator], is_done)
        yield StageTask("pretrain", [*self._launcher, "pretrain"], self._is_pretrained())

    @property
    def _launcher(self) -> list[str]:
        return [*self.launcher, "--module", COMMANDS] if self.launcher else list(ONE_PROCESS)

    def _is_pretrained(self) -> bool:
        folder = self.folder / "pretrain"
        is_there = (folder / PRETRAIN_RECORD).is_file()
        return is_there and read_pretrain_record(folder)["step"] == self.config.pretrain.steps

    @property
    def final_checkpoint(self) -> Path:
        return self.folder / f"pretrain/checkpoints/step_{self.config.pretrain.steps}/state"

    def has_begun(self) -> bool:
        return any(folder.exists() for folder in self.run_folders())

    def is_finished(self) -> bool:
        return all(task.is_done for task in self.tasks())

    def add_differences(self, errors: ErrorCollector) -> None:
        """Adds an error for each setting of the stage's runs that the config states otherwise now."""
        changed = ErrorCollector(self.name, ConfigError)
        toml, record = self.folder / STAGE_CONFIG, self.folder / "pretrain" / PRETRAIN_RECORD
        if toml.is_file():
            then, now = RunConfig.load(toml).to_dict(), self.config.to_dict()
            add_differences(_comparable(then), _comparable(now), changed, by_content=True)
        if record.is_file():
            sections = ("small", "large") if self.config.pretrain.start == SCRATCH else ()
            identity = run_identity(self.config, "pretrain", sections)
            add_differences(read_pretrain_record(self.folder / "pretrain")["run"], identity, changed, by_content=True)
        for problem in {problem.where: problem for problem in changed.problems}.values():
            errors.add(f"{self.name}: {problem.where}", problem.expected, problem.found, problem.hint)

    def run_folders(self) -> list[Path]:
        return [self.folder / task.name for task in self.tasks()]


def load_stages(path: Path, output: Path) -> list[GrowthStage]:
    """Reads the stages of a TOML file. Raises ConfigError with every fault of every stage, before anything runs."""
    table = read_toml(path)
    errors = ErrorCollector(f"chain {path}", ConfigError)
    for name in table.keys() - {"shared", "stages"}:
        errors.add(name, "[shared] or [[stages]]", "another section", did_you_mean(name, ("shared", "stages")))
    tables, shared = table.get("stages"), table.get("shared", {})
    if not isinstance(tables, list) or not all(isinstance(own, dict) for own in tables) or not isinstance(shared, dict):
        errors.add("stages", "one table [[stages]] per model", "none")
        errors.raise_if_any()
    stages: list[GrowthStage] = []
    for number in range(1, len(tables) + 1):
        stage = _read_stage(tables, number, shared, stages, output, errors)
        if stage:
            stages.append(stage)
    errors.raise_if_any()
    return stages


def _read_stage(
    tables: list[dict], number: int, shared: dict, stages: list[GrowthStage], output: Path, errors: ErrorCollector
) -> GrowthStage | None:
    table, previous = tables[number - 1], stages[-1] if stages else None
    name, launcher = table.get("name"), table.get("launcher", [])
    where = f"stage {number} ({name})"
    taken = [REPORT, *(other.get("name") for other in tables[: number - 1])]
    if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum() or name in taken:
        errors.add(f"{where}: name", "a unique name of letters, digits, _ and -", repr(name))
        return None
    if not isinstance(launcher, list) or not all(isinstance(word, str) for word in launcher):
        errors.add(f"{where}: launcher", "a list of strings", repr(launcher))
        return None
    folder = output / name
    sections = _merge_tables(shared, {key: value for key, value in table.items() if key not in STAGE_KEYS})
    if not previous:
        sections = _merge_tables({"pretrain": {"start": SCRATCH}}, sections)
    else:
        sections = _merge_tables({"fit": {"steps": 0}}, sections)
        # The format that a user names is that of the path that the user names.
        small = {"path": str(previous.final_checkpoint), "format": "auto"}
        sections = _merge_tables(sections, {"small": small})
        sections = _merge_tables(sections, {"pretrain": {"start": str(folder / "grown")}})
    try:
        config = RunConfig.from_dict(sections, where)
    except ConfigError as error:
        errors.add_message(str(error))
        return None
    if not config.pretrain.steps:
        errors.add(f"{where}: pretrain.steps", "at least 1: every stage trains its model", 0)
    return GrowthStage(name, folder, tuple(launcher), config, previous)


def _merge_tables(base: Mapping, override: Mapping) -> dict:
    """Merges nested tables; values of `override` win."""
    merged = {
        key: _merge_tables(base[key], override[key])
        for key in base.keys() & override.keys()
        if isinstance(override[key], dict)
    }
    return {**base, **override, **merged}


def run_stages(
    stages: Sequence[GrowthStage], output: Path, log_line: Callable[[str], None], accept_changed: bool = False
) -> None:
    """Runs every unfinished command in order; writes lineage and report after each stage. Raises a command's error.

    ConfigError if the settings of a stage that has begun have changed, DataError if what a finished one stands on has.
    accept_changed: passes --accept-changed-data to the commands, and records in chain.json what has changed under
    finished stages.
    """
    check_output(output, CHAIN)
    with exclusive_access(output):
        begun = [stage for stage in stages if stage.has_begun()]
        errors = ErrorCollector(f"{output} holds stages with other settings", ConfigError)
        for stage in begun:
            stage.add_differences(errors)
        errors.raise_if_any()
        accepted = _read_accepted(output / RECORD)
        accepted += _check_inputs([stage for stage in begun if stage.is_finished()], output, accept_changed, accepted)
        for number, stage in enumerate(stages, 1):
            _run_stage(stage, log_line, ["--accept-changed-data"] if accept_changed else [])
            write_lineage(stages[:number], output, accepted)


def _comparable(config: dict) -> dict:
    """Returns a config without the keys that may change between a run and its resumption."""
    return {
        name: {key: value for key, value in section.items() if key not in (*CHANGEABLE_KEYS, "cache")}
        for name, section in config.items()
    }


def _check_inputs(
    stages: Sequence[GrowthStage], output: Path, accept_changed: bool, known: Sequence[dict]
) -> list[dict]:
    """Returns what to record if the user accepts that inputs of the finished stages have changed since they ran.

    known: what was accepted before. Raises DataError with every change that is not accepted.
    """
    errors, cache = ErrorCollector(f"{output}: what finished stages stand on has changed", DataError), DigestCache()
    for stage in stages:
        for folder in stage.run_folders():
            errors.problems += chain.find_changed_inputs(folder, cache)
    if errors.problems and accept_changed:
        entry = describe_acceptance(errors.problems)
        return [] if entry["changes"] in [other["changes"] for other in known] else [entry]
    if errors.problems:
        errors.add_message("Bring it back, choose another --output, or pass --accept-changed-data.")
    errors.raise_if_any()
    return []


def _read_accepted(path: Path) -> list[dict]:
    """Reads from chain.json which changes were accepted before. CheckpointError if it is not as it was written."""
    try:
        accepted = read_json(path, finite=False).get(ACCEPTED, []) if path.is_file() else []
        if not all(isinstance(entry["changes"], list) for entry in accepted):
            raise TypeError("changes")
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        hint = "Remove it: it is written again."
        raise CheckpointError(Problem(f"{path}", "the record of a chain of stages", f"{error!r}", hint)) from None
    return accepted


def _run_stage(stage: GrowthStage, log_line: Callable[[str], None], options: list[str]) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    config = stage.folder / STAGE_CONFIG
    if not stage.is_finished():
        write_bytes(config, _to_toml(stage.config.to_dict()).encode())
    for task in stage.tasks():
        log_line(f"{stage.name}: {task.name}{' is done' if task.is_done else ''}")
        if not task.is_done:
            output = ["--config", str(config), "--output", str(stage.folder / task.name)]
            _run_command([*task.command, *output, *options])


def _to_toml(sections: dict) -> str:
    """Writes a config as TOML with dotted keys; None is left out."""
    return "".join(f"{key} = {format_value(value)}\n" for key, value in _dotted_keys(sections))


def _dotted_keys(table: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _run_command(words: list[str]) -> None:
    """Runs a command, which gets SIGTERM if this process dies. Stopped if a signal ended it, LigoError if it failed."""

    def terminate_with_parent() -> None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    process = subprocess.Popen(words, preexec_fn=terminate_with_parent)
    with signal_handling.wait_for_child_runs():
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code - 128 in signal_handling.STOP_SIGNALS:
        raise Stopped(code - 128, "the chain resumes here when it is started again.")
    if code:
        raise LigoError(Problem(" ".join(words), "exit code 0", code, "See its own message above."))


def write_lineage(stages: Sequence[GrowthStage], output: Path, accepted: Sequence[dict] = ()) -> None:
    """Writes OUTPUT/chain.json and OUTPUT/report for the finished stages. accepted: changes under them."""
    runs = read_runs([folder for stage in stages for folder in stage.run_folders()])
    prior_flops, links = _build_lineage(runs)
    write_report([run.folder for run in runs], output / REPORT, prior_flops=prior_flops)
    write_json(output / RECORD, {"stages": links, ACCEPTED: list(accepted), "versions": library_versions()})


def _build_lineage(runs: list[RecordedRun]) -> tuple[dict[Path, float], list[dict]]:
    """Returns the FLOPs spent before each run, by its folder, and the lineage as plain data."""
    total, prior_flops, links = 0.0, {}, []
    for run in runs:
        prior_flops[run.folder] = total
        total += run.total("flops") or 0.0
        links.append(
            {
                "stage": run.folder.parent.name,
                "run": run.folder.name,
                "model": None if run.model_config is None else run.model_config.to_json(),
                "from": run.initialised_by,
                "losses": run.losses,
                "steps": run.steps,
                "tokens": run.total("tokens"),
                "flops": run.total("flops"),
                "flops_since_the_first_stage": total,
                "source": run.record.get("source"),
                "operator": run.record.get("operator") if run.kind == "hand-off" else None,
            }
        )
    return prior_flops, links
