"""A run that is killed again and again must end as one that is left alone: any command, for as long as wanted."""

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

# What a run leaves that must not depend on what befell it, besides metrics.jsonl.
COMPARED_FILES = ("operator/operator.safetensors",)
LOSSES = ("operator/operator.json", "pretrain.json")
# The ranks that are not harmed mostly end by themselves before.
LAUNCHER_WAITS = 15.0
KILL_MODES = ("SIGKILL to all", "SIGKILL to one", "SIGTERM to the first", "SIGTERM to one")


@dataclass
class KillTestResult:
    """kills, by what was done; rounds: runs that came to their end; steps: compared, bit for bit."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KILL_MODES, 0))
    rounds: int = 0
    steps: int = 0


def run_kill_test(
    command: list[str], folder: Path, kills: int, seed: int, tell: Callable[[str], None], ranks: int | None = None
) -> KillTestResult:
    """Runs `command --output FOLDER/whole` alone, then others that are killed so many times in all.

    ranks: of a script, which are forked from a process that has imported everything; else the command is started.
    ConfigError if the command fails when it is left alone; CheckpointError if a killed one does not end as it did.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(Problem(f"{folder}", "an empty folder", "files in it", "Choose another --output."))
    start = partial(_LaunchedCommand, command) if ranks is None else partial(_ForkedCommand, command, ranks)
    if ranks is not None:
        forked_ranks.warm_up()
    began = time.monotonic()
    code = start(folder / "whole").ends()
    length = time.monotonic() - began
    if code:
        raise ConfigError(
            Problem(" ".join(command), "exit code 0 when it is left alone", code, _log_hint(folder / "whole"))
        )
    expected = run_outcome(folder / "whole")
    tell(f"left alone it takes {length:.0f} s and {len(expected['steps'])} steps")
    done = KillTestResult()
    while sum(done.kills.values()) < kills:
        output = folder / f"round_{done.rounds}"
        for how, after in _kill_schedule(draw, length):
            if sum(done.kills.values()) == kills:
                how = None
            if _run_once(start(output), output, how, after, draw):
                break
            done.kills[how] += 1
            tell(f"{sum(done.kills.values())}: {how} after {after:.1f} s")
        found = run_outcome(output)
        if found != expected:
            differ = [name for name in expected if found.get(name) != expected[name]]
            raise CheckpointError(Problem(f"{output}", "what the undisturbed run left", f"other {', '.join(differ)}"))
        done.rounds += 1
        done.steps += len(expected["steps"])
        shutil.rmtree(output)
    return done


def run_outcome(output: Path) -> dict[str, object]:
    """The steps with all but their seconds, the last losses, and the bytes of the operator."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    left: dict[str, object] = {"steps": [{key: row[key] for key in row if key != "seconds"} for row in rows]}
    left |= {name: (output / name).read_bytes() for name in COMPARED_FILES if (output / name).is_file()}
    return left | {
        name: json.loads((output / name).read_text())["losses"] for name in LOSSES if (output / name).exists()
    }


def _kill_schedule(draw: random.Random, length: float) -> Iterator[tuple[str, float]]:
    while True:
        yield draw.choice(KILL_MODES), draw.uniform(0.0, 1.2 * length)


class _LaunchedCommand:
    """A command and whatever it starts."""

    def __init__(self, command: list[str], output: Path):
        with output.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log)

    def ends(self, after: float | None = None) -> int | None:
        """The exit code; None if it has none after so many seconds."""
        try:
            return self._process.wait(after)
        except subprocess.TimeoutExpired:
            return None

    def everyone(self) -> list[psutil.Process]:
        first = psutil.Process(self._process.pid)
        return [first, *first.children(recursive=True)]


class _ForkedCommand:
    """So many ranks of a script."""

    def __init__(self, command: list[str], ranks: int, output: Path):
        script, *arguments = command
        arguments = [*arguments, "--output", str(output)]
        self._ranks = forked_ranks.ForkedRanks(Path(script), arguments, output.with_suffix(".log"), ranks)
        self._ranks.start()

    def ends(self, after: float | None = None) -> int | None:
        """As a launcher ends: what is left of the ranks is asked to, some time after the first has failed."""
        until = math.inf if after is None else time.monotonic() + after
        asked_at = math.inf
        while None in (codes := self._ranks.wait(0)) and time.monotonic() < until:
            if any(codes) and asked_at == math.inf:
                asked_at = time.monotonic() + LAUNCHER_WAITS
            if time.monotonic() > asked_at:
                for process in self.everyone():
                    process.terminate()
                asked_at = until
            time.sleep(0.05)
        return None if None in codes else next((code for code in codes if code), 0)

    def everyone(self) -> list[psutil.Process]:
        return [psutil.Process(rank.pid) for rank in self._ranks.ranks if rank.is_alive()]


def _run_once(
    run: _LaunchedCommand | _ForkedCommand, output: Path, how: str | None, after: float, draw: random.Random
) -> bool:
    """Does that to a run after so many seconds; True if it had ended well before."""
    code = run.ends(None if how is None else after)
    if code is None:
        _kill(run, how, draw)
        return False
    if code:
        raise CheckpointError(Problem(f"{output}", "exit code 0 when it is started again", code, _log_hint(output)))
    return True


def _kill(run: _LaunchedCommand | _ForkedCommand, how: str, draw: random.Random) -> None:
    """Harms a process and those beside and below it, and waits until none is left."""
    everyone = run.everyone()
    number = signal.SIGKILL if "SIGKILL" in how else signal.SIGTERM
    chosen = everyone if how.endswith("all") else everyone[:1] if how.endswith("first") else [draw.choice(everyone)]
    for each in chosen:
        if each.is_running():
            each.send_signal(number)
    code = run.ends(120)
    _, alive = psutil.wait_procs(everyone, timeout=120)
    if alive or code is None:
        for each in alive:
            each.kill()
        raise CheckpointError(Problem(how, "an end of all processes within 120 s", f"{len(alive)} that live"))


def _log_hint(output: Path) -> str:
    return f"See {output.with_suffix('.log')}*."
