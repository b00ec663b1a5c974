"""Runs a script on several ranks, forked from a preloaded process so that they start within seconds."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path

PRELOAD = ("megatron_ligo.testing.preload",)

Enter = Callable[[int], None]


def preloaded_context(preload: Sequence[str] = PRELOAD) -> ForkServerContext:
    """Returns a forkserver context whose processes have imported these modules."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def warm_up() -> None:
    """Starts the forkserver and waits until ranks can be forked."""
    first = preloaded_context().Process(target=os.getpid)
    first.start()
    first.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ForkedRanks:
    """`world` ranks of a script; each appends to LOG.{rank}.out and .err.

    enter: called on each rank before anything else. preload: modules imported once, before the first fork.
    """

    def __init__(
        self,
        script: Path,
        arguments: Sequence[str],
        log: Path,
        world: int,
        port: int | None = None,
        enter: Enter | None = None,
        preload: Sequence[str] = PRELOAD,
    ):
        context = preloaded_context(preload)
        port = port or free_port()
        jobs = [(rank, world, port, str(script), list(arguments), str(log), enter) for rank in range(world)]
        self.ranks = [context.Process(target=_run_rank, args=job) for job in jobs]

    def start(self) -> None:
        for process in self.ranks:
            process.start()

    def wait(self, seconds: float | None = None) -> list[int | None]:
        """Returns exit codes by rank: negative for a killing signal, None if still running after `seconds`."""
        deadline = None if seconds is None else time.monotonic() + seconds
        for process in self.ranks:
            process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.ranks]

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()


def _run_rank(
    rank: int, world: int, port: int, script: str, arguments: list[str], log: str, enter: Enter | None
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if enter:
        enter(rank)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
