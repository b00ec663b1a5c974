"""Runs the jobs of a comparison, each once and in its own folder; later requests read its result.

Several commands may share one folder: each waits for a job that another is running. A killed job resumes from its last
checkpoint.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.common import signal_handling
from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import ConfigError, LigoError, Problem
from megatron_ligo.common.file_lock import lock_file
from megatron_ligo.config.run_config import SCRATCH, RunConfig
from megatron_ligo.experiments.compare.job_inputs import JobInputs
from megatron_ligo.experiments.compare.run_folder import (
    CODES,
    ERROR,
    GROW,
    JOB,
    LOCK,
    LOG,
    PRETRAIN,
    RESULT,
    RUN,
    copy_run,
)
from megatron_ligo.export.run_inputs import ACCEPTED, INPUTS

MODULE = "megatron_ligo.experiments.compare.single_run"
QUIET_IMPORTS = "megatron_ligo.experiments.quiet_imports"


@dataclass(frozen=True)
class ComparisonJob:
    """kind: fit, grow, codes or pretrain; operator: applied by "grow"; keep: its checkpoints start other jobs.

    continues: the name of the job whose run this one extends; empty: none. other_valid: held-out text on which the
    run's last loss is measured too, beside data.valid.
    """

    name: str
    kind: str
    config: RunConfig
    operator: Path | None = None
    keep: bool = False
    continues: str = ""
    other_valid: tuple[str | float, ...] = ()

    def to_dict(self) -> dict:
        optional = {"continues": self.continues, "other_valid": list(self.other_valid)}
        return {
            "kind": self.kind,
            "config": self.config.to_dict(),
            "operator": f"{self.operator}" if self.operator else None,
            "keep": self.keep,
        } | {key: value for key, value in optional.items() if value}


class JobQueue:
    """Runs jobs under a folder, one at a time. launcher: see [compare]; log_line: receives one line per job.

    accept_changed: jobs whose inputs have changed since are accepted, and job.json records it.
    """

    def __init__(self, folder: Path, launcher: str, log_line: Callable[[str], None], accept_changed: bool = False):
        self.folder = folder
        self.launcher = shlex.split(launcher)
        self.log_line = log_line
        self.inputs, self.accept_changed = JobInputs(), accept_changed
        self.forks = multiprocessing.get_context("forkserver")
        # Slow imports run once, and what libraries say of themselves goes to the runs' logs.
        self.forks.set_forkserver_preload([QUIET_IMPORTS, MODULE])

    def folder_of(self, job: ComparisonJob) -> Path:
        return self.folder / job.name

    def is_busy(self, folder: str) -> bool:
        """True if another command is running a job below a folder of the jobs."""
        paths = (path for path in (self.folder / folder).rglob(LOCK) if path.parent.name != RUN)
        locks = [lock_file(path) for path in paths]
        for lock in filter(None, locks):
            lock.close()
        return None in locks

    def result(self, job: ComparisonJob) -> dict | None:
        """Returns the job's result; None while it is unfinished. Raises ConfigError if the folder holds another job."""
        folder = self.folder_of(job)
        if not (folder / JOB).is_file():
            return None
        then = json.loads((folder / JOB).read_text(encoding="utf-8"))
        if job.kind == PRETRAIN and not then["config"]["pretrain"]["start"] and job.config.pretrain.start == SCRATCH:
            # Before scratch had a name, it had none.
            then["config"]["pretrain"]["start"] = SCRATCH
        saved_inputs, accepted = then.pop(INPUTS, None), then.pop(ACCEPTED, [])
        # A setting added after the run was written had its default value.
        then["config"] = RunConfig.from_dict(then["config"], f"{folder / JOB}").to_dict()
        if then != job.to_dict():
            hint = "Use the same settings, or choose another --output."
            raise ConfigError(Problem(f"{folder}", "a run with these settings", f"other settings in {JOB}", hint))
        acceptance = self.inputs.check(saved_inputs, job.config, folder, self.accept_changed)
        if acceptance:
            self._write_job(job, [*accepted, acceptance])
        return json.loads((folder / RESULT).read_text(encoding="utf-8")) if (folder / RESULT).is_file() else None

    def run(self, job: ComparisonJob) -> dict:
        """Returns the job's result, running it first if necessary. Raises LigoError naming the log if it fails."""
        folder = self.folder_of(job)
        folder.mkdir(parents=True, exist_ok=True)
        with lock_file(folder / LOCK, wait=True):
            result = self.result(job)
            if result:
                return result
            self.log_line(job.name)
            if not (folder / JOB).is_file():
                self._write_job(job, [])
            if job.continues and not (folder / RUN).exists():
                copy_run(self.folder / job.continues / RUN, folder / RUN)
            (folder / ERROR).unlink(missing_ok=True)
            # Growth and counting run in one process.
            code = self._launch(folder) if self.launcher and job.kind not in (GROW, CODES) else self._fork(folder)
            result = self.result(job)
            if code or result is None:
                hint = _describe_end(folder)
                raise LigoError(Problem(f"{folder / LOG}", "a run that succeeds", f"exit code {code}", hint))
            return result

    def _write_job(self, job: ComparisonJob, accepted: list[dict]) -> None:
        record = {**job.to_dict(), INPUTS: self.inputs.describe(job.config)}
        write_json(self.folder_of(job) / JOB, record | ({ACCEPTED: accepted} if accepted else {}))

    def _fork(self, folder: Path) -> int | None:
        process = self.forks.Process(target=_run_in_child, args=(folder,))
        process.start()
        with signal_handling.wait_for_child_runs():
            try:
                process.join()
            finally:
                if process.is_alive():
                    # SIGTERM lets the run save.
                    process.terminate()
                    process.join()
        return process.exitcode

    def _launch(self, folder: Path) -> int:
        with (folder / LOG).open("a") as log:
            process = subprocess.Popen([*self.launcher, MODULE, str(folder)], stdout=log, stderr=log)
            with signal_handling.wait_for_child_runs():
                try:
                    return process.wait()
                finally:
                    if process.poll() is None:
                        process.terminate()
                        process.wait()


def _run_in_child(folder: Path) -> None:
    """Runs a job in a child process whose output goes to the job's log."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from megatron_ligo.experiments.compare import single_run

    signal_handling.install_handlers()
    sys.exit(single_run.main(folder))


def _describe_end(folder: Path) -> str:
    """Returns the error that ended a run, or the last line of its log: a launcher's lines follow the error there."""
    if (folder / ERROR).is_file():
        return (folder / ERROR).read_text(encoding="utf-8").strip()
    return f"Its last line: {_last_log_line(folder / LOG)}"


def _last_log_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "none"
