"""The real deepspeed launcher: signals it forwards, exit codes it returns, and ranks it leaves behind."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from megatron_ligo.commands import launching
from megatron_ligo.testing.forked_ranks import free_port
from tests.reliability.commands import ROOT, TIMEOUT_SECONDS, Run
from tests.reliability.test_kills import final_results

LAYOUT = "fit.parallel.tp=2"
SECRET = "correct-horse-battery-staple"
# A network namespace with only a loopback device, where the machine allows one.
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


@functools.cache
def network_prefix() -> list[str]:
    able = shutil.which("unshare") and shutil.which("ip")
    return ALONE if able and subprocess.run([*ALONE, "true"], capture_output=True).returncode == 0 else []


@contextmanager
def launch_fit(log: Path, *arguments: str) -> Iterator[subprocess.Popen]:
    """Runs `deepspeed --num_gpus 2 tools/fit.py ARGUMENTS` with its output in a file; kills leftovers at the end."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["SOME_TOKEN"] = SECRET
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "tools/fit.py", *arguments]
    with log.open("w") as file:
        runner = subprocess.Popen(
            [*network_prefix(), *command], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield runner
    finally:
        below = psutil.Process(runner.pid).children(recursive=True) if runner.poll() is None else []
        for process in [runner, *below]:
            process.kill()
        runner.wait()


def wait_for_step(log: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(int(logged) >= step for logged in re.findall(r"^step (\d+)/", log.read_text(), re.M)):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_a_user_fault_is_the_launchers_exit_code(config, tmp_path):
    log = tmp_path / "log"
    with launch_fit(
        log, "--config", str(config), "--output", str(tmp_path / "out"), "--set", "fit.parallel.tp=4"
    ) as run:
        assert run.wait(TIMEOUT_SECONDS) == 2
    text = log.read_text()
    assert text.count("expected a multiple of tp x pp = 4") == 1 and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_signals_through_the_launcher_and_a_killed_launcher(config, whole, tmp_path):
    """SIGTERM to the launcher, SIGINT from a terminal to all, SIGKILL to the launcher's parent: the ranks save and end.

    All without a network except the loopback device.
    """
    output, log = tmp_path / "run", tmp_path / "log"
    arguments = ["--config", str(config), "--output", str(output), "--set", LAYOUT]
    with launch_fit(log, *arguments) as runner:
        wait_for_step(log, 3)
        (launcher,) = psutil.Process(runner.pid).children()
        began = time.monotonic()
        launcher.terminate()
        assert runner.wait(60) == 1
        assert time.monotonic() - began < 30
    assert "SIGTERM: saved after step" in log.read_text() and "Traceback" not in log.read_text()
    with launch_fit(log, *arguments) as runner:
        wait_for_step(log, 6)
        ranks = psutil.Process(runner.pid).children(recursive=True)[1:]
        os.killpg(runner.pid, signal.SIGINT)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert len(ranks) == 2 and not alive
    # The launcher also sends SIGTERM; either may arrive first.
    assert re.search(r"^SIG(INT|TERM): saved after step", log.read_text(), re.M), log.read_text()
    with launch_fit(log, *arguments) as runner:
        wait_for_step(log, 9)
        ranks = psutil.Process(runner.pid).children(recursive=True)[1:]
        assert len(ranks) == 2
        runner.kill()
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert not alive
    assert "SIGTERM: saved after step" in log.read_text()
    with Run("fit", config, output, LAYOUT) as run:
        assert run.exit_codes() == [0, 0], run.stderr(0)
    assert final_results(output, "fit") == final_results(whole("fit", LAYOUT), "fit")
    left = [path for path in output.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in left} == {0o666 & ~umask()}
    assert not any(SECRET.encode() in path.read_bytes() for path in [*left, log])


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# A module that every rank runs: it imports no library, and ends as commands do.
RANK_MODULE = """
import os, pathlib, sys, time
from megatron_ligo import cli

def main():
    pathlib.Path(sys.argv[-1], "rank" + os.environ["RANK"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    time.sleep(100)

cli.run_command(main)
"""


@contextmanager
def launch_processes(folder: Path) -> Iterator[subprocess.Popen]:
    """Runs RANK_MODULE on two ranks as `--processes 2` does, in a session of its own."""
    (folder / "rank_module.py").write_text(RANK_MODULE)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "CUDA_VISIBLE_DEVICES": "5,3,7"}
    # A shell's background job, such as this test may be, ignores SIGINT.
    command = ["env", "--default-signal=INT", *shlex.split(launching.launcher_command(2)), "rank_module", str(folder)]
    launcher = subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True)
    try:
        yield launcher
    finally:
        for process in session_processes(launcher.pid):
            process.kill()
        launcher.communicate()


def session_processes(session: int) -> list[psutil.Process]:
    processes = []
    for process in psutil.process_iter():
        with suppress(OSError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_launcher_of_processes_that_is_killed_while_it_starts_starts_none(tmp_path, number):
    with launch_processes(tmp_path) as launcher:
        # Its imports take some seconds of CPU.
        wait_until(lambda: sum(psutil.Process(launcher.pid).cpu_times()[:2]) > 1.0)
        assert len(session_processes(launcher.pid)) == 1
        launcher.send_signal(number)
        assert launcher.wait(60) == -number and "Traceback" not in launcher.stderr.read()
        assert not session_processes(launcher.pid) and not list(tmp_path.glob("rank?"))


def test_the_launcher_of_processes_that_is_killed_is_no_success(tmp_path):
    """Each rank has one of the devices that the user allows."""
    with launch_processes(tmp_path) as launcher:
        wait_until(lambda: all((tmp_path / f"rank{rank}").is_file() for rank in range(2)))
        assert {(tmp_path / f"rank{rank}").read_text() for rank in range(2)} == {"5,3"}
        assert len(session_processes(launcher.pid)) == 3
        launcher.kill()
        assert launcher.wait(60) == -signal.SIGKILL
        wait_until(lambda: not session_processes(launcher.pid))
        assert "SIGTERM: ended." in launcher.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_launcher_of_processes_returns_the_signal_that_ended_it(tmp_path, number):
    with launch_processes(tmp_path) as launcher:
        wait_until(lambda: all((tmp_path / f"rank{rank}").is_file() for rank in range(2)))
        # As a terminal sends it: to all.
        os.killpg(launcher.pid, number)
        assert launcher.wait(60) == 128 + number
        assert not session_processes(launcher.pid)
