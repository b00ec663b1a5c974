"""Real commands on real ranks over TCP, forked from a preloaded process: they start in seconds."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from megatron_ligo.testing.forked_ranks import Enter, ForkedRanks

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 200.0


class Command(ForkedRanks):
    """Ranks of a script with their own logs; a context manager that kills leftover ranks."""

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

    def exit_codes(self, timeout: float = TIMEOUT_SECONDS) -> list[int]:
        """Waits for all ranks; returns their exit codes (negative: the killing signal)."""
        hanging = [rank for rank, code in enumerate(self.wait(timeout)) if code is None]
        self.signal(signal.SIGABRT, *hanging)
        for rank in hanging:
            # SIGABRT makes it dump its stack.
            self.ranks[rank].join()
            raise AssertionError(f"rank {rank} did not end within {timeout} s\n{self.stderr(rank)}")
        return [process.exitcode for process in self.ranks]

    def exit_codes_as_launched(self) -> list[int]:
        """Like `exit_codes`, but terminates the others after the first failure, as the launcher does."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not any(process.exitcode for process in self.ranks) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        self.signal(signal.SIGTERM, *(rank for rank, process in enumerate(self.ranks) if process.is_alive()))
        return self.exit_codes(20)

    def stderr(self, rank: int) -> str:
        """Returns a rank's stderr."""
        return Path(f"{self.log}.{rank}.err").read_text()

    def signal(self, number: int, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.ranks[rank].pid, number)


class Run(Command):
    """tools/{tool}.py on two or more ranks."""

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

    def wait_for_step(self, step: int) -> None:
        """Waits until `step` is logged."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._step() < step:
            assert time.monotonic() < deadline, f"step {step} was not reached"
            assert all(process.is_alive() for process in self.ranks), self.stderr(0)
            time.sleep(0.01)

    def _step(self) -> int:
        stdout = Path(f"{self.log}.0.out")
        steps = re.findall(r"^step (\d+)/", stdout.read_text(), re.M) if stdout.is_file() else []
        return int(steps[-1]) if steps else 0
