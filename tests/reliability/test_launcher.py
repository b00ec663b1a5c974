"""Under the real deepspeed launcher: what it passes on, what it returns, and what becomes of its ranks without it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_ligo.testing.forked_ranks import free_port
from tests.reliability.commands import PATIENCE, ROOT, Run
from tests.reliability.test_kills import ended

LAYOUT = "fit.parallel.tp=2"
SECRET = "correct-horse-battery-staple"
# A network of its own that has a loopback device and nothing else, where the machine lets us make one.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@functools.cache
def alone() -> list[str]:
    able = shutil.which("unshare") and shutil.which("ip")
    return ALONE if able and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0 else []


@contextmanager
def launched(log: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """`deepspeed --num_gpus 2 tools/fit.py ARGUMENTS`, its output in a file. Nothing of it is left behind."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["SOME_TOKEN"] = SECRET
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "tools/fit.py", *arguments]
    with log.open("w") as file:
        runner = subprocess.Popen(
            [*alone(), *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield runner
    finally:
        below = psutil.Process(runner.pid).children(recursive=True) if runner.poll() is None else []
        for process in [runner, *below]:
            process.kill()
        runner.wait()


def reached(log: Path, step: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not any(int(found) >= step for found in re.findall(r"^step (\d+)/", log.read_text(), re.M)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_user_fault_is_the_launchers_exit_code(config, tmp_path):
    log = tmp_path / "log"
    with launched(log, "--config", str(config), "--output", str(tmp_path / "out"), "--set", "fit.parallel.tp=4") as run:
        assert run.wait(PATIENCE) == 2
    told = log.read_text()
    assert told.count("expected a multiple of tp x pp = 4") == 1 and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_stopped_by_the_launcher_and_left_by_it(config, whole, tmp_path):
    """SIGTERM to the launcher: one rank is asked to end, all save and do. SIGINT, as a terminal gives it to all.
    SIGKILL to what started the launcher: its ranks see it and save. All of it with no network but the loopback
    device."""
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = ["--config", str(config), "--output", str(output), "--set", LAYOUT]
    with launched(log, *arguments) as runner:
        reached(log, 3)
        (launcher,) = psutil.Process(runner.pid).children()
        began = time.monotonic()
        launcher.terminate()
        assert runner.wait(60) == 1
        assert time.monotonic() - began < 30
    assert "SIGTERM: saved after step" in log.read_text() and "Traceback" not in log.read_text()
    with launched(log, *arguments) as runner:
        reached(log, 6)
        ranks = psutil.Process(runner.pid).children(recursive=True)[1:]
        os.killpg(runner.pid, signal.SIGINT)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert len(ranks) == 2 and not alive
    # The launcher adds a SIGTERM of its own: which one a rank sees first is open.
    assert re.search(r"^SIG(INT|TERM): saved after step", log.read_text(), re.M), log.read_text()
    with launched(log, *arguments) as runner:
        reached(log, 9)
        ranks = psutil.Process(runner.pid).children(recursive=True)[1:]
        assert len(ranks) == 2
        runner.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    assert "SIGTERM: saved after step" in log.read_text()
    with Run("fit", config, output, LAYOUT) as run:
        assert run.ends() == [0, 0], run.said(0)
    assert ended(output, "fit") == ended(whole("fit", LAYOUT), "fit")
    left = [path for path in output.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in left} == {0o666 & ~umask()}
    assert not any(SECRET.encode() in path.read_bytes() for path in [*left, log])


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
