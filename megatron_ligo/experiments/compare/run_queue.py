"""The runs of a comparison, each in a folder of its own and done once: whoever comes later finds its result.

Several commands may work on one folder: a run that another is at is waited for. Killed and started again, a run goes
on from its last checkpoint.
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

from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import ConfigError, LigoError, Problem
from megatron_ligo.common.file_lock import lock
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.run_folder import GROW, JOB, LOCK, LOG, RESULT

MODULE = "megatron_ligo.experiments.compare.single_run"


@dataclass(frozen=True)
class ComparisonJob:
    """kind: "fit", "grow" or "pretrain"; operator: what `grow` applies; keep: its checkpoints are a start."""

    name: str
    kind: str
    config: RunConfig
    operator: Path | None = None
    keep: bool = False

    def to_dict(self) -> dict:
        return {
            "kind": self.kind,
            "config": self.config.to_dict(),
            "operator": f"{self.operator}" if self.operator else None,
            "keep": self.keep,
        }


class JobQueue:
    """Runs jobs under a folder, one after the other. launcher: see [compare]; tell: one line for each job."""

    def __init__(self, folder: Path, launcher: str, tell: Callable[[str], None]):
        self.folder = folder
        self.launcher = shlex.split(launcher)
        self.tell = tell
        self.forks = multiprocessing.get_context("forkserver")
        # Everything that takes long to import is imported once.
        self.forks.set_forkserver_preload([MODULE])

    def place(self, job: ComparisonJob) -> Path:
        return self.folder / job.name

    def result(self, job: ComparisonJob) -> dict | None:
        """What the job has left; None while it is not done. ConfigError if another job is there."""
        folder = self.place(job)
        if not (folder / JOB).is_file():
            return None
        then = json.loads((folder / JOB).read_text(encoding="utf-8"))
        # A setting that came after the run was at its default.
        then["config"] = RunConfig.from_dict(then["config"], f"{folder / JOB}").to_dict()
        if then != job.to_dict():
            hint = "Compare with the same, or choose another --output."
            raise ConfigError(Problem(f"{folder}", "a run with these settings", f"others in {JOB}", hint))
        return json.loads((folder / RESULT).read_text(encoding="utf-8")) if (folder / RESULT).is_file() else None

    def run(self, job: ComparisonJob) -> dict:
        """The job's result, after it has been done if need be. LigoError if it fails; its log is named."""
        folder = self.place(job)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK, wait=True):
            found = self.result(job)
            if found:
                return found
            self.tell(job.name)
            write_json(folder / JOB, job.to_dict())
            # Growth needs no ranks.
            code = self._launch(folder) if self.launcher and job.kind != GROW else self._fork(folder)
            found = self.result(job)
            if code or found is None:
                hint = f"Its last words: {_last_log_line(folder / LOG)}"
                raise LigoError(Problem(f"{folder / LOG}", "a run that ends well", f"exit code {code}", hint))
            return found

    def _fork(self, folder: Path) -> int | None:
        process = self.forks.Process(target=_run_in_child, args=(folder,))
        process.start()
        try:
            process.join()
        finally:
            if process.is_alive():
                # It saves, and ends.
                process.terminate()
                process.join()
        return process.exitcode

    def _launch(self, folder: Path) -> int:
        with (folder / LOG).open("a") as log:
            process = subprocess.Popen([*self.launcher, MODULE, str(folder)], stdout=log, stderr=log)
            try:
                return process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()


def _run_in_child(folder: Path) -> None:
    """In a process of its own: what the run says goes to its log."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from megatron_ligo.common import signal_handling
    from megatron_ligo.experiments.compare import single_run

    signal_handling.install()
    sys.exit(single_run.main(folder))


def _last_log_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1] if lines else "none"
