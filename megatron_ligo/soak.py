"""A run that is killed again and again must end as one that is left alone: any command, for as long as wanted."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_ligo.errors import CheckpointError, ConfigError, message

# What a run leaves that must not depend on what befell it, besides metrics.jsonl.
LEFT = ("operator/operator.safetensors",)
LOSSES = ("operator/operator.json", "pretrain.json")
HOW = ("SIGKILL to all", "SIGKILL to one", "SIGTERM to the first", "SIGTERM to one")


@dataclass
class Soak:
    """kills, by what was done; rounds: runs that came to their end; steps: compared, bit for bit."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(HOW, 0))
    rounds: int = 0
    steps: int = 0


def soak(command: list[str], folder: Path, kills: int, seed: int, tell: Callable[[str], None]) -> Soak:
    """Runs `command --output FOLDER/whole` alone, then others that are killed so many times in all.

    ConfigError if the command fails when it is left alone; CheckpointError if a killed one does not end as it did.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(message(f"{folder}", "an empty folder", "files in it", "Choose another --output."))
    began = time.monotonic()
    code = _start(command, folder / "whole").wait()
    length = time.monotonic() - began
    if code:
        raise ConfigError(
            message(" ".join(command), "exit code 0 when it is left alone", code, _last(folder / "whole"))
        )
    expected = what_it_left(folder / "whole")
    tell(f"left alone it takes {length:.0f} s and {len(expected['steps'])} steps")
    done = Soak()
    while sum(done.kills.values()) < kills:
        output = folder / f"round_{done.rounds}"
        for how, after in _moments(draw, length):
            if sum(done.kills.values()) == kills:
                how = None
            if _one(command, output, how, after, draw):
                break
            done.kills[how] += 1
            tell(f"{sum(done.kills.values())}: {how} after {after:.1f} s")
        found = what_it_left(output)
        if found != expected:
            differ = [name for name in expected if found.get(name) != expected[name]]
            raise CheckpointError(message(f"{output}", "what the undisturbed run left", f"other {', '.join(differ)}"))
        done.rounds += 1
        done.steps += len(expected["steps"])
        shutil.rmtree(output)
    return done


def what_it_left(output: Path) -> dict[str, object]:
    """The steps with all but their seconds, the last losses, and the bytes of the operator."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    left: dict[str, object] = {"steps": [{key: row[key] for key in row if key != "seconds"} for row in rows]}
    left |= {name: (output / name).read_bytes() for name in LEFT if (output / name).is_file()}
    return left | {
        name: json.loads((output / name).read_text())["losses"] for name in LOSSES if (output / name).exists()
    }


def _moments(draw: random.Random, length: float) -> Iterator[tuple[str, float]]:
    while True:
        yield draw.choice(HOW), draw.uniform(0.0, 1.2 * length)


def _one(command: list[str], output: Path, how: str | None, after: float, draw: random.Random) -> bool:
    """Starts the command and does that to it after so many seconds; True if it had ended well before."""
    process = _start(command, output)
    try:
        code = process.wait(None if how is None else after)
    except subprocess.TimeoutExpired:
        _do(process, how, draw)
        return False
    if code:
        raise CheckpointError(message(f"{output}", "exit code 0 when it is started again", code, _last(output)))
    return True


def _do(process: subprocess.Popen, how: str, draw: random.Random) -> None:
    """Harms a process and those below it, and waits until none is left."""
    first = psutil.Process(process.pid)
    everyone = [first, *first.children(recursive=True)]
    number = signal.SIGKILL if "SIGKILL" in how else signal.SIGTERM
    chosen = everyone if how.endswith("all") else everyone[:1] if how.endswith("first") else [draw.choice(everyone)]
    for each in chosen:
        if each.is_running():
            each.send_signal(number)
    _, alive = psutil.wait_procs(everyone, timeout=120)
    process.wait()
    if alive:
        for each in alive:
            each.kill()
        raise CheckpointError(message(how, "an end of all processes within 120 s", f"{len(alive)} that live"))


def _start(command: list[str], output: Path) -> subprocess.Popen:
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log)


def _last(output: Path) -> str:
    return f"See {output.with_suffix('.log')}."
