"""Real commands on real ranks over TCP, forked from the process that has imported everything: seconds, not minutes."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from megatron_ligo.testing.forked_ranks import Enter, ForkedRanks

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 200.0


class Command(ForkedRanks):
    """Ranks of a script, with logs of their own. A context manager: no rank outlives it."""

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
        super().__init__(script, arguments, log, world, port, enter, ["tests.preload"])

    def __enter__(self) -> Command:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ends(self, patience: float = PATIENCE) -> list[int]:
        """The ranks' exit codes (negative: the signal that killed it)."""
        hanging = [rank for rank, code in enumerate(self.wait(patience)) if code is None]
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
