"""Real commands on real ranks over TCP, forked from the process that has imported everything: seconds, not minutes."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 200.0

Enter = Callable[[int], None]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(rank: int, world: int, port: int, script: str, arguments: list[str], log: str, enter: Enter | None) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if enter:
        enter(rank)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    faulthandler.enable()
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Command:
    """`world` ranks of a script, which log to LOG.{rank}.out and .err. A context manager: no rank outlives it.

    enter: called on each rank before anything else.
    """

    def __init__(
        self,
        script: Path,
        arguments: list[str],
        log: Path,
        world: int,
        port: int | None = None,
        enter: Enter | None = None,
    ):
        self.log = log
        for old in log.parent.glob(f"{log.name}.*"):
            old.unlink()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.preload"])
        port = port or free_port()
        jobs = [(rank, world, port, str(script), arguments, str(log), enter) for rank in range(world)]
        self.ranks = [context.Process(target=_run, args=job) for job in jobs]

    def __enter__(self) -> Command:
        for process in self.ranks:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
        for process in self.ranks:
            process.join()

    def ends(self, patience: float = PATIENCE) -> list[int]:
        """The ranks' exit codes (negative: the signal that killed it)."""
        deadline = time.monotonic() + patience
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        hanging = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        self.signal(signal.SIGABRT, *hanging)
        for rank in hanging:
            # It leaves its stack.
            self.ranks[rank].join()
            raise AssertionError(f"rank {rank} did not end within {patience} s\n{self.said(rank)}")
        return [process.exitcode for process in self.ranks]

    def ends_launched(self) -> list[int]:
        """`ends`, with the others asked to end when the first has failed, as the launcher does."""
        deadline = time.monotonic() + PATIENCE
        while not any(process.exitcode for process in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        self.signal(signal.SIGTERM, *(rank for rank, process in enumerate(self.ranks) if process.is_alive()))
        return self.ends(20)

    def said(self, rank: int) -> str:
        """What a rank has written to stderr."""
        return Path(f"{self.log}.{rank}.err").read_text()

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.ranks[rank].pid, number)


class Run(Command):
    """tools/{tool}.py on two ranks, or more."""

    def __init__(
        self,
        tool: str,
        config: Path,
        output: Path,
        *sets: str,
        port: int | None = None,
        world: int = 2,
        enter: Enter | None = None,
    ):
        arguments = ["--config", str(config), "--output", str(output)]
        for text in sets:
            arguments += ["--set", text]
        log = output.parent / f"{output.name}.log"
        super().__init__(ROOT / "tools" / f"{tool}.py", arguments, log, world, port, enter)

    def reaches(self, step: int) -> None:
        """Waits until it has taken a step, and so many are done."""
        deadline = time.monotonic() + PATIENCE
        while self._step() < step:
            assert time.monotonic() < deadline, f"step {step} was not reached"
            assert all(process.is_alive() for process in self.ranks), self.said(0)
            time.sleep(0.01)

    def _step(self) -> int:
        told = Path(f"{self.log}.0.out")
        done = re.findall(r"^step (\d+)/", told.read_text(), re.M) if told.is_file() else []
        return int(done[-1]) if done else 0
