"""SIGINT and SIGTERM: an end at once, or, where work goes on that has better moments to stop, at the next of them.

A process that sits in a library's call runs no Python handler. So a thread learns of each signal from the descriptor
that the interpreter writes to at once, and ends the process itself when the time is over. It also watches the launcher:
DeepSpeed's passes no signal on when it is killed, and its ranks would go on alone.
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

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# To end in where nothing was deferred.
EXIT_SECONDS = 10.0
LAUNCHER_MODULE, RUNNER_COMMAND = b"deepspeed.launcher.launch", b"deepspeed"


class Interrupted(KeyboardInterrupt):
    """A stop signal arrived. Not an Exception, so that no library catches it."""

    def __init__(self, signum: int):
        super().__init__(f"{signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class SignalState:
    grace: float | None = None  # seconds, while deferred
    received: int | None = None


def install_handlers() -> None:
    """Once for a process, in its main thread; processes that are forked from it later have the usual signals again."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for signum in STOP_SIGNALS:
        signal.signal(signum, _on_signal)
    os.register_at_fork(after_in_child=_restore_defaults)
    threading.Thread(target=_watch_signals_and_parents, args=(read, _launcher_parents()), daemon=True).start()


def exit_process(code: int) -> NoReturn:
    """Ends the process; one that has met other ranks without taking the interpreter down.

    A thread of gloo's that lets go of its last tensor while the interpreter ends calls std::terminate (torch 2.13):
    a run that was done would now and then exit with SIGABRT.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def received_signal() -> int | None:
    """The signal that has come since `deferred` began."""
    return SignalState.received


@contextmanager
def defer_signals(grace: float) -> Iterator[None]:
    """Inside, a signal is only noted: the work asks `received` and ends by itself, within so many seconds."""
    before, SignalState.grace = SignalState.grace, grace
    try:
        yield
    finally:
        SignalState.grace = before


def _on_signal(signum: int, frame: object) -> None:
    impatient = signum == signal.SIGINT == SignalState.received
    if SignalState.grace is None or impatient:
        raise Interrupted(signum)
    SignalState.received = signum


def _restore_defaults() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch_signals_and_parents(read: int, ancestors: list[tuple[int, int]]) -> NoReturn:
    while True:
        ready, _, _ = select.select([read], [], [], 1.0)
        if ready:
            signum = os.read(read, 1)[0]
            if signum in STOP_SIGNALS:
                _exit_after(EXIT_SECONDS if SignalState.grace is None else SignalState.grace, signum)
        elif any(_parent_pid(child) != parent for child, parent in ancestors):
            ancestors = []
            os.kill(os.getpid(), signal.SIGTERM)


def _exit_after(seconds: float, signum: int) -> NoReturn:
    time.sleep(seconds)
    name = signal.Signals(signum).name
    print(f"{name}: not done within {seconds:g} s: ended without saving.", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def _launcher_parents() -> list[tuple[int, int]]:
    """(process, its parent) for each launcher above this process, which is to be there as long as it runs."""
    if "RANK" not in os.environ:
        return []
    launcher = os.getppid()
    above = [(os.getpid(), launcher)]
    runner = _parent_pid(launcher)
    if LAUNCHER_MODULE in _command_line(launcher) and runner is not None and RUNNER_COMMAND in _command_line(runner):
        above.append((launcher, runner))
    return above


def _command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


def _parent_pid(process: int) -> int | None:
    if process == os.getpid():
        return os.getppid()
    try:
        # The second field is a name, in parentheses, which may hold anything.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None
