"""The processes of a comparison's runs: what they show on the terminal, and what ended one that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ligo.common.errors import LigoError
from megatron_ligo.common.file_lock import lock_file
from megatron_ligo.experiments.compare.comparison import share_arms
from megatron_ligo.experiments.compare.comparison_config import select_arms
from megatron_ligo.experiments.compare.run_folder import PRETRAIN
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from tests.experiments.compare.made_up_runs import write_comparison

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import os, sys
from pathlib import Path
from megatron_ligo.experiments.compare.run_queue import JobQueue

if __name__ == "__main__":
    process = JobQueue(Path("."), "", print).forks.Process(target=os.getpid)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.long
def test_what_libraries_warn_of_as_they_are_imported_is_not_on_the_terminal():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "UserWarning" not in done.stderr, done.stderr


def test_a_failed_run_is_reported_by_its_own_error_not_by_its_launchers_last_line(tmp_path):
    script = '"$0" -m "$@"; code=$?; echo "exits with return code = $code"; exit $code'
    jobs = JobQueue(tmp_path / "jobs", f"sh -c '{script}' {sys.executable}", lambda line: None)
    config = write_comparison(tmp_path).config
    with pytest.raises(LigoError, match=r"exit code 2.*pretrain.start.*expected") as caught:
        jobs.run(ComparisonJob("lost", PRETRAIN, config))
    assert "return code" not in str(caught.value) and "return code" in (tmp_path / "jobs/lost/log.txt").read_text()


def test_commands_that_share_a_folder_begin_with_different_arms(tmp_path):
    spec = write_comparison(tmp_path, 'arms.stacked.operator.method="stack"', 'arms.copied.operator.method="lossless"')
    jobs = JobQueue(tmp_path / "jobs", "", lambda line: None)
    job, run = tmp_path / "jobs/stacked/seed_1/try", tmp_path / "jobs/copied/seed_1/grown/run"
    for folder in (job, run):
        folder.mkdir(parents=True)
    arms = select_arms(spec, ("stacked", "copied", "scratch"))
    with lock_file(job / ".lock"), lock_file(run / ".lock"):
        assert jobs.is_busy("stacked") and not jobs.is_busy("copied"), "a run's own lock is not to be touched"
        shared = [arm.name for arm in share_arms(arms, jobs)]
    assert shared[-1] == "stacked" and sorted(shared) == sorted(arm.name for arm in arms)
    assert [arm.name for arm in share_arms(arms, jobs)] == [arm.name for arm in arms]
