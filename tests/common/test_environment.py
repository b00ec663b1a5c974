"""The environment of the scripts (launch_scripts/setup.sh), with an interpreter that only writes down its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/sh
case "$*" in
*torch*) exit 0 ;;
*"-m pip"*) echo "$*" >> "$LOG"; [ -z "$FAILS" ] || case "$*" in *"$FAILS"*) exit 1 ;; esac ;;
"-m venv "*) echo "$*" >> "$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
*) exec "$REAL" "$@" ;;
esac
"""
DEV, PLAIN = "requirements-dev.txt", "requirements.txt"


class Environment:
    def __init__(self, folder: Path):
        self.root, self.log = folder / "source", folder / "log"
        (self.root / "launch_scripts").mkdir(parents=True)
        for name in ("launch_scripts/setup.sh", PLAIN, "requirements-models.txt", DEV, "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.python = folder / "python-stub"
        self.python.write_text(STUB)
        self.python.chmod(0o755)

    def set_up(self, *arguments: str, fails: str = "", code: int = 0) -> list[str]:
        """Returns what the interpreter was asked to install or create, in turn."""
        self.log.write_text("")
        environment = {**os.environ, "LOG": str(self.log), "REAL": sys.executable, "FAILS": fails}
        environment |= {"PYTHON": str(self.python), "VENV": str(self.root.parent / "env")}
        script = f"source launch_scripts/setup.sh {' '.join(arguments)}"
        words = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
        return self.log.read_text().splitlines()


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path)


def names(lines: list[str], *files: str) -> list[str]:
    return [file for line in lines for file in files if line.endswith(f"-r {file}")]


def test_an_environment_with_the_test_tools_has_all_of_the_other(environment):
    assert names(environment.set_up("dev"), PLAIN, DEV) == [PLAIN, DEV]
    assert environment.set_up() == [] and environment.set_up("dev") == []


def test_the_test_tools_are_added_to_an_environment(environment):
    assert names(environment.set_up(), PLAIN, DEV) == [PLAIN]
    assert environment.set_up() == []
    assert names(environment.set_up("dev", fails=DEV, code=2), PLAIN, DEV) == [DEV]
    added = environment.set_up("dev")
    assert len(added) == 1 and names(added, DEV) == [DEV]
    assert environment.set_up("dev") == [] and environment.set_up() == []


def test_an_environment_of_other_pins_is_set_up_again(environment):
    environment.set_up("dev")
    pins = environment.root / PLAIN
    before = pins.read_text()
    pins.write_text(before + "\n# changed\n")
    assert names(environment.set_up(), PLAIN, DEV) == [PLAIN]
    # Its packages are no longer those of the pins before.
    pins.write_text(before)
    assert names(environment.set_up(fails=PLAIN, code=2), PLAIN, DEV) == [PLAIN]
    assert names(environment.set_up("dev"), PLAIN, DEV) == [PLAIN, DEV]
