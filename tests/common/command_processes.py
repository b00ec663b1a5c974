"""Commands of a few lines as processes, to see how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def write_script(tmp_path: Path, body: str) -> Path:
    """Writes a command whose main() has the given body."""
    script = tmp_path / "command.py"
    head = (
        "import logging, time\nfrom megatron_ligo import cli\nfrom megatron_ligo.common import errors\n\ndef main():\n"
    )
    script.write_text(
        head
        + textwrap.indent(textwrap.dedent(body), "    ")
        + '\nif __name__ == "__main__":\n    cli.run_command(main)\n'
    )
    return script


def start(script: Path, *args: str, **env: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen([sys.executable, script, *args], env=env, text=True, stdout=-1, stderr=-1)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for a process; returns its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err
