"""The kill test: a run that is killed repeatedly must end with the results of an undisturbed run."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil

from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem
from megatron_ligo.testing import forked_ranks

# Outputs that must not depend on kills, besides metrics.jsonl.
COMPARED_FILES = ("operator/operator.safetensors",)
LOSSES = ("operator/operator.json", "pretrain.json")
# Seconds for the other ranks to end by themselves after the first failure.
LAUNCHER_WAITS = 15.0
KILL_MODES = ("SIGKILL to all", "SIGKILL to one", "SIGTERM to the first", "SIGTERM to one")


@dataclass
class KillTestResult:
    """kills: count by mode; rounds: runs that finished; steps: number compared bit for bit."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KILL_MODES, 0))
    rounds: int = 0
    steps: int = 0


def run_kill_test(
    command: list[str], folder: Path, kills: int, seed: int, log_line: Callable[[str], None], ranks: int | None = None
) -> KillTestResult:
    """Runs `command --output FOLDER/whole` undisturbed, then runs that are killed `kills` times in total.

    ranks: number of ranks of the script `command`, forked from a preloaded process; None: launches `command` itself.
    Raises ConfigError if the undisturbed run fails, CheckpointError if a killed run ends differently.
    """
    generator = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(Problem(f"{folder}", "an empty folder", "files in it", "Choose another --output."))
    start = partial(_LaunchedCommand, command) if ranks is None else partial(_ForkedCommand, command, ranks)
    if ranks is not None:
        forked_ranks.warm_up()
    begin = time.monotonic()
    code = start(folder / "whole").wait()
    length = time.monotonic() - begin
    if code:
        raise ConfigError(Problem(" ".join(command), "exit code 0 when undisturbed", code, _log_hint(folder / "whole")))
    expected = run_outcome(folder / "whole")
    log_line(f"undisturbed: {length:.0f} s, {len(expected['steps'])} steps")
    result = KillTestResult()
    while sum(result.kills.values()) < kills:
        output = folder / f"round_{result.rounds}"
        for how, after in _kill_schedule(generator, length):
            if sum(result.kills.values()) == kills:
                how = None
            if _run_once(start(output), output, how, after, generator):
                break
            result.kills[how] += 1
            log_line(f"{sum(result.kills.values())}: {how} after {after:.1f} s")
        outcome = run_outcome(output)
        if outcome != expected:
            differing = [name for name in expected if outcome.get(name) != expected[name]]
            raise CheckpointError(
                Problem(f"{output}", "the results of the undisturbed run", f"other {', '.join(differing)}")
            )
        result.rounds += 1
        result.steps += len(expected["steps"])
        shutil.rmtree(output)
    return result


def run_outcome(output: Path) -> dict[str, object]:
    """Returns the logged steps without their seconds, the final losses and the operator's bytes."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    outcome: dict[str, object] = {"steps": [{key: row[key] for key in row if key != "seconds"} for row in rows]}
    outcome |= {name: (output / name).read_bytes() for name in COMPARED_FILES if (output / name).is_file()}
    return outcome | {
        name: json.loads((output / name).read_text())["losses"] for name in LOSSES if (output / name).exists()
    }


def _kill_schedule(generator: random.Random, length: float) -> Iterator[tuple[str, float]]:
    while True:
        yield generator.choice(KILL_MODES), generator.uniform(0.0, 1.2 * length)


class _LaunchedCommand:
    """A launched command with its child processes."""

    def __init__(self, command: list[str], output: Path):
        with output.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log)

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the exit code; None after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def processes(self) -> list[psutil.Process]:
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]


class _ForkedCommand:
    """The forked ranks of a script."""

    def __init__(self, command: list[str], ranks: int, output: Path):
        script, *arguments = command
        arguments = [*arguments, "--output", str(output)]
        self._ranks = forked_ranks.ForkedRanks(Path(script), arguments, output.with_suffix(".log"), ranks)
        self._ranks.start()

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits as a launcher does: ends the remaining ranks LAUNCHER_WAITS seconds after the first failure."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        terminate_at = math.inf
        while None in (codes := self._ranks.wait(0)) and time.monotonic() < until:
            if any(codes) and terminate_at == math.inf:
                terminate_at = time.monotonic() + LAUNCHER_WAITS
            if time.monotonic() > terminate_at:
                for process in self.processes():
                    process.terminate()
                terminate_at = until
            time.sleep(0.05)
        return None if None in codes else next((code for code in codes if code), 0)

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(rank.pid) for rank in self._ranks.ranks if rank.is_alive()]


def _run_once(
    run: _LaunchedCommand | _ForkedCommand, output: Path, how: str | None, after: float, generator: random.Random
) -> bool:
    """Kills a run after `after` seconds; returns True if it had already finished successfully."""
    code = run.wait(None if how is None else after)
    if code is None:
        _kill(run, how, generator)
        return False
    if code:
        raise CheckpointError(Problem(f"{output}", "exit code 0 after a restart", code, _log_hint(output)))
    return True


def _kill(run: _LaunchedCommand | _ForkedCommand, how: str, generator: random.Random) -> None:
    """Sends the signal and waits until no process is left. CheckpointError if one is left after 120 s."""
    processes = run.processes()
    number = signal.SIGKILL if "SIGKILL" in how else signal.SIGTERM
    if how.endswith("all"):
        targets = processes
    else:
        targets = processes[:1] if how.endswith("first") else [generator.choice(processes)]
    for process in targets:
        if process.is_running():
            process.send_signal(number)
    code = run.wait(120)
    _, alive = psutil.wait_procs(processes, timeout=120)
    if alive or code is None:
        for process in alive:
            process.kill()
        raise CheckpointError(Problem(how, "all processes to end within 120 s", f"{len(alive)} still running"))


def _log_hint(output: Path) -> str:
    return f"See {output.with_suffix('.log')}*."
