"""SIGINT, SIGTERM and SIGHUP: exit at once, or, during work that saves its state, at the next point where it can stop.

Python runs no signal handler while a library call blocks. So a thread reads each signal from the interpreter's wake-up
descriptor and ends the process itself when the grace period is over. The thread also watches the launcher: a
killed DeepSpeed launcher forwards no signal, and its ranks would keep running.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The time that the process has to exit after a signal that is not deferred.
EXIT_SECONDS = 10.0
LAUNCHER_MODULE, RUNNER_COMMAND = b"deepspeed.launcher.launch", b"deepspeed"
# The pid of no process.
GONE = 0


class Interrupted(KeyboardInterrupt):
    """A stop signal arrived. Not an Exception, so that no library catches it."""

    def __init__(self, signum: int):
        super().__init__(f"{signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class SignalState:
    grace_seconds: float | None = None  # set while signals are deferred
    received: int | None = None
    has_child_runs = False  # set while runs in child processes save after a signal


def install_handlers() -> None:
    """Installs the handlers; call once per process, in its main thread. Forked processes get the defaults back."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for signum in STOP_SIGNALS:
        # `nohup` has it ignored.
        if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _on_signal)
    os.register_at_fork(after_in_child=_restore_defaults)
    threading.Thread(target=_watch_signals_and_parents, args=(read_end, _launcher_parents()), daemon=True).start()


def exit_process(code: int) -> NoReturn:
    """Ends the process. If it has a process group, the interpreter is not finalized.

    A gloo thread that frees its last tensor during finalization calls std::terminate (torch 2.13), so that a finished
    run would sometimes exit with SIGABRT.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def received_signal() -> int | None:
    """Returns the number of the signal that arrived while signals were deferred, or None."""
    return SignalState.received


@contextmanager
def defer_signals(grace_seconds: float) -> Iterator[None]:
    """Records signals instead of raising: the work inside polls `received_signal` and ends within `grace_seconds`.

    A second SIGINT still interrupts at once.
    """
    previous, SignalState.grace_seconds = SignalState.grace_seconds, grace_seconds
    try:
        yield
    finally:
        SignalState.grace_seconds = previous


@contextmanager
def wait_for_child_runs() -> Iterator[None]:
    """Lets the process outlive a signal for as long as its child processes take: their own grace periods end them."""
    previous, SignalState.has_child_runs = SignalState.has_child_runs, True
    try:
        yield
    finally:
        SignalState.has_child_runs = previous


def _on_signal(signum: int, frame: object) -> None:
    is_second_interrupt = signum == signal.SIGINT == SignalState.received
    if SignalState.grace_seconds is None or is_second_interrupt:
        raise Interrupted(signum)
    SignalState.received = signum


def _restore_defaults() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _watch_signals_and_parents(read_end: int, parents: list[tuple[int, int]]) -> NoReturn:
    while True:
        ready, _, _ = select.select([read_end], [], [], 1.0)
        if ready:
            signum = os.read(read_end, 1)[0]
            if signum in STOP_SIGNALS and not SignalState.has_child_runs:
                grace_seconds = SignalState.grace_seconds
                _exit_after(EXIT_SECONDS if grace_seconds is None else grace_seconds, signum)
        elif any(_parent_pid(child) != parent for child, parent in parents):
            parents = []
            os.kill(os.getpid(), signal.SIGTERM)


def _exit_after(seconds: float, signum: int) -> NoReturn:
    time.sleep(seconds)
    name = signal.Signals(signum).name
    print(f"{name}: not done within {seconds:g} s: ended without saving.", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def _launcher_parents() -> list[tuple[int, int]]:
    """Returns (pid, parent's pid) of this process and of its launcher. A changed parent: the launcher is gone.

    A launcher that has died while this process started has left it to process 1, or to a supervisor that adopts.
    """
    if "RANK" not in os.environ:
        return []
    launcher = os.getppid()
    if _is_adopted(os.getpid(), launcher) and any(word.startswith("--local_rank=") for word in sys.argv):
        return [(os.getpid(), GONE)]
    parents = [(os.getpid(), launcher)]
    runner = _parent_pid(launcher)
    if LAUNCHER_MODULE in _command_line(launcher) and runner is not None:
        if RUNNER_COMMAND in _command_line(runner):
            parents.append((launcher, runner))
        elif _is_adopted(launcher, runner):
            parents.append((launcher, GONE))
    return parents


def _is_adopted(child: int, parent: int) -> bool:
    """True if `parent` did not start `child`: a child that leads no session is in that of the process that started it.

    Process 1 may be in the same session: it counts as a parent only if it is a launcher, as in a container.
    """
    try:
        session = os.getsid(child)
        if session not in (child, os.getsid(parent)):
            return True
    except OSError:
        return False
    return parent == 1 and not any(name in _command_line(parent) for name in (RUNNER_COMMAND, b"torch", b"launch"))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_pid(pid: int) -> int | None:
    if pid == os.getpid():
        return os.getppid()
    try:
        # The second field is the process name in parentheses, which may hold any character.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
