"""The processes of a comparison's runs: what they show on the terminal."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
