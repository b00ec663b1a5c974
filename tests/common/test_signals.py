"""How commands end when a signal, a dead launcher or a closed terminal ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.common.command_processes import ROOT, finish, start, write_script

# On a busy machine a process may need long to end: only a test of that limit shortens it.
PATIENT = (
    "from megatron_ligo.common import signal_handling; signal_handling.EXIT_SECONDS = {seconds}; "
    "print('ready', flush=True); "
)
INTERRUPTIBLE = "time.sleep(160)"
# A mutex that is locked twice: a C call that no Python signal handler interrupts.
UNINTERRUPTIBLE = (
    "import ctypes; mutex = ctypes.create_string_buffer(64); "
    "[ctypes.CDLL(None).pthread_mutex_lock(mutex) for _ in range(2)]"
)


def await_sleep(process: subprocess.Popen) -> None:
    """Waits until a process that has said that it is ready sleeps in a system call, however busy the machine is."""
    assert process.stdout.readline() == "ready\n"
    main_thread = Path(f"/proc/{process.pid}/task/{process.pid}/stat")
    asleep = 0
    while asleep < 4:
        state = main_thread.read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.05)


def test_an_interrupt_exits_with_130(tmp_path):
    process = start(write_script(tmp_path, PATIENT.format(seconds=150) + INTERRUPTIBLE))
    await_sleep(process)
    process.send_signal(2)
    code, _, err = finish(process)
    assert code == 130 and err == "SIGINT: ended.\n"


@pytest.mark.parametrize(
    ("work", "seconds", "message"),
    [(INTERRUPTIBLE, 150, "SIGTERM: ended."), (UNINTERRUPTIBLE, 0.5, "SIGTERM: not done within 0.5 s")],
)
def test_sigterm_exits_with_143(tmp_path, work, seconds, message):
    process = start(write_script(tmp_path, PATIENT.format(seconds=seconds) + work))
    await_sleep(process)
    process.terminate()
    code, _, err = finish(process)
    assert code == 143 and err.startswith(message) and err.count("\n") == 1


def test_a_command_outlives_the_runs_that_it_has_started(tmp_path):
    """A run may save for longer than its command would have to exit."""
    run = "import signal, time; signal.signal(15, lambda *_: (time.sleep(3), print('saved'), exit(0))); time.sleep(160)"
    work = f"""
import subprocess, sys
run = subprocess.Popen([sys.executable, "-c", {run!r}])
time.sleep(2)
with signal_handling.wait_for_child_runs():
    try:
        {PATIENT.format(seconds=0.5)}
        run.wait()
    finally:
        run.terminate()
        run.wait()
"""
    process = start(write_script(tmp_path, "from megatron_ligo.common import signal_handling" + work))
    await_sleep(process)
    process.terminate()
    assert finish(process) == (143, "saved\n", "SIGTERM: ended.\n")


# PR_SET_CHILD_SUBREAPER: orphans below this process become its children, as under systemd and Slurm.
ADOPTING_SUPERVISOR = """
import ctypes, os, subprocess, sys
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0
subprocess.run([sys.executable, "-c", sys.argv[1]], start_new_session=True, check=True)
os.wait()
"""


@pytest.mark.parametrize("adopter", ["process 1", "a supervisor"])
def test_a_rank_whose_launcher_died_before_it_had_started_ends(tmp_path, adopter):
    """It ends as SIGTERM would end it, for no later signal can reach it."""
    ended = tmp_path / "ended"
    body = f"import sys; sys.stderr = open({str(ended)!r}, 'w', buffering=1); time.sleep(60)"
    script = write_script(tmp_path, body)
    script.write_text(
        "import os, time\nwhile os.getppid() == int(os.environ['LAUNCHER']):\n    time.sleep(0.05)\n"
        + script.read_text()
    )
    launcher = (
        "import os, subprocess, sys; env = {**os.environ, 'LAUNCHER': str(os.getpid())}; "
        f"subprocess.Popen([sys.executable, {str(script)!r}, '--local_rank=0'], env=env)"
    )
    code = [launcher] if adopter == "process 1" else [ADOPTING_SUPERVISOR, launcher]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    subprocess.run([sys.executable, "-c", *code], env=env, timeout=200, check=True)
    deadline = time.monotonic() + 60
    while not (ended.is_file() and ended.read_text() == "SIGTERM: ended.\n") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ended.read_text() == "SIGTERM: ended.\n"


@pytest.mark.parametrize("leads_session", [False, True])
def test_a_rank_of_a_living_launcher_runs(tmp_path, leads_session):
    """Also one that the launcher has put into a session of its own, as torchrun does."""
    script = write_script(tmp_path, "time.sleep(2.5); print('done')")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
    command = [sys.executable, script, "--local_rank=0"]
    done = subprocess.run(
        command, env=env, timeout=200, capture_output=True, text=True, start_new_session=leads_session
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_closed_terminal_ends_like_sigterm(tmp_path):
    """Unless `nohup` has had it ignored."""
    # The tests may themselves run under `nohup`, whose children ignore the signal.
    heard = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); "
    script = write_script(tmp_path, PATIENT.format(seconds=150) + INTERRUPTIBLE)
    script.write_text(heard + script.read_text())
    process = start(script)
    await_sleep(process)
    process.send_signal(signal.SIGHUP)
    assert finish(process)[::2] == (129, "SIGHUP: ended.\n")
    body = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["nohup", sys.executable, write_script(tmp_path, body)]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_forked_children_have_default_signal_handlers(tmp_path):
    """A terminated child ends, and its parent does not."""
    body = """
        import multiprocessing
        from megatron_ligo.common import signal_handling
        signal_handling.EXIT_SECONDS = 0.5
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        time.sleep(0.5)
        child.terminate()
        child.join()
        time.sleep(2)
        print(child.exitcode)
    """
    assert finish(start(write_script(tmp_path, body))) == (0, "-15\n", "")
