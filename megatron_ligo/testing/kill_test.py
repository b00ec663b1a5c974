"""The kill test: a command that is killed repeatedly must end with the results of an undisturbed one.

FOLDER/whole         the undisturbed results
FOLDER/kills.json    what was tried so far: a later call goes on from there
"""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

from megatron_ligo.common import library_log
from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem
from megatron_ligo.common.file_digest import SEAL, digest_file
from megatron_ligo.testing import forked_ranks

TALLY, WHOLE, ROUND, METRICS = "kills.json", "whole", "round", "metrics.jsonl"
# Folders and files whose bytes hold times, or the identity of Python's objects.
UNCOMPARED_NAMES = {"tensorboard", "checkpoints", "report", library_log.FILE_NAME}
# Entries of records that hold times or memory, or digests of such.
UNCOMPARED_KEYS = {"seconds", "peak_memory_bytes", "job", SEAL}
# Stands for the output folder in a command; without it, `--output FOLDER` is appended.
OUTPUT = "{output}"
# Python's own process, which ignores SIGTERM and ends after the others.
TRACKER = "resource_tracker"
# Seconds for the other ranks to end by themselves after the first failure.
LAUNCHER_WAITS = 15.0
# Seconds for all processes to end after a kill: in which they use next to no CPU, and at all. On a busy machine one
# that has just been started may take minutes to notice.
IDLE_LIMIT, IDLE_CPU, LIMIT = 120.0, 0.5, 1200.0
KILL_MODES = ("SIGKILL to all", "SIGKILL to one", "SIGTERM to the first", "SIGTERM to one")


@dataclass
class KillTestResult:
    """kills: count by mode; rounds: runs that finished; steps: number of training steps compared bit for bit.

    length: seconds of the undisturbed run.
    """

    command: list[str]
    ranks: int | None
    seed: int
    length: float = 0.0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KILL_MODES, 0))
    rounds: int = 0
    steps: int = 0

    @property
    def count(self) -> int:
        return sum(self.kills.values())


def run_kill_test(
    command: list[str], folder: Path, kills: int, seed: int, log_line: Callable[[str], None], ranks: int | None = None
) -> KillTestResult:
    """Runs the command undisturbed into FOLDER/whole, then kills others until there were `kills` in FOLDER's tally.

    ranks: number of ranks of the script `command`, forked from a preloaded process; None: launches `command` itself.
    Raises ConfigError if the undisturbed run fails or the folder is another test's, CheckpointError if a killed run
    ends differently.
    """
    start = partial(_LaunchedCommand, command) if ranks is None else partial(_ForkedCommand, command, ranks)
    if ranks is not None:
        forked_ranks.warm_up()
    result = _read_tally(folder, KillTestResult(command, ranks, seed)) or _run_whole(
        start, folder, command, ranks, seed
    )
    expected = run_outcome(folder / WHOLE)
    log_line(f"undisturbed: {result.length:.0f} s, {len(expected)} files; {result.count} kills before")
    while result.count < kills:
        output = _new_round(folder)
        generator, tried = random.Random(f"{seed}:{result.rounds}"), Counter()
        for how, after in _kill_schedule(generator, result.length):
            if result.count + tried.total() == kills:
                how = None
            run = start(output)
            try:
                has_finished = _run_once(run, output, how, after, generator)
            except BaseException:
                # Interrupted: the run would go on by itself.
                _end(run.processes())
                raise
            if has_finished:
                break
            tried[how] += 1
            log_line(f"{result.count + tried.total()}: {how} after {after:.1f} s")
        outcome = run_outcome(output)
        if outcome != expected:
            names = sorted(name for name in expected | outcome if outcome.get(name) != expected.get(name))
            raise CheckpointError(
                Problem(f"{output}", "the results of the undisturbed run", f"other {', '.join(names)}")
            )
        result.rounds += 1
        result.steps += sum(len(rows) for rows in expected.values() if isinstance(rows, list))
        result.kills = {how: number + tried[how] for how, number in result.kills.items()}
        write_json(folder / TALLY, asdict(result))
    return result


def _new_round(folder: Path) -> Path:
    """Returns the output folder of every round, removed with its logs: records state the path."""
    output = folder / ROUND
    shutil.rmtree(output, ignore_errors=True)
    for path in folder.glob(f"{ROUND}.log*"):
        path.unlink()
    return output


def _read_tally(folder: Path, new: KillTestResult) -> KillTestResult | None:
    """Returns what an earlier call has tried, if it was of the same command, ranks and seed; None for a new folder."""
    path = folder / TALLY
    if path.is_file():
        result = KillTestResult(**read_json(path))
        if (result.command, result.ranks, result.seed) == (new.command, new.ranks, new.seed):
            return result
    if folder.is_dir() and any(folder.iterdir()):
        hint = "Choose another --output."
        raise ConfigError(Problem(f"{folder}", "an empty folder, or this command's kills", "other files", hint))
    return None


def _run_whole(start: Callable, folder: Path, command: list[str], ranks: int | None, seed: int) -> KillTestResult:
    """Runs the command undisturbed."""
    folder.mkdir(parents=True, exist_ok=True)
    output, begin = _new_round(folder), time.monotonic()
    code = start(output).wait()
    result = KillTestResult(command, ranks, seed, time.monotonic() - begin)
    if code:
        raise ConfigError(Problem(" ".join(command), "exit code 0 when undisturbed", code, _log_hint(output)))
    output.rename(folder / WHOLE)
    write_json(folder / TALLY, asdict(result))
    return result


def run_outcome(output: Path) -> dict[str, object]:
    """Returns every result that must not depend on kills, by file.

    Of metrics.jsonl: its rows without seconds; of JSON: its values without times and memory; of others: a digest.
    """
    outcome: dict[str, object] = {}
    for path in sorted(output.rglob("*") if output.is_dir() else [output]):
        name = path.relative_to(output)
        if not path.is_file() or any(part.startswith(".") or part in UNCOMPARED_NAMES for part in name.parts):
            continue
        if path.name == METRICS:
            outcome[f"{name}"] = [_comparable(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            outcome[f"{name}"] = _comparable(json.loads(path.read_text()))
        else:
            outcome[f"{name}"] = digest_file(path)
    return outcome


def _comparable(value: object) -> object:
    if isinstance(value, dict):
        return {key: _comparable(item) for key, item in value.items() if key not in UNCOMPARED_KEYS}
    return [_comparable(item) for item in value] if isinstance(value, list) else value


def _with_output(command: list[str], output: Path) -> list[str]:
    """Returns the command that writes to `output`."""
    if any(OUTPUT in word for word in command):
        return [word.replace(OUTPUT, f"{output}") for word in command]
    return [*command, "--output", f"{output}"]


def _kill_schedule(generator: random.Random, length: float) -> Iterator[tuple[str, float]]:
    while True:
        yield generator.choice(KILL_MODES), generator.uniform(0.0, 1.2 * length)


class _LaunchedCommand:
    """A launched command with its child processes."""

    def __init__(self, command: list[str], output: Path):
        words = _with_output(command, output)
        self._output_words = {word for word in words if f"{output}" in word}
        with output.with_suffix(".log").open("a") as log:
            self._process = subprocess.Popen(words, stdout=log, stderr=log)

    def wait(self, timeout: float | None = None) -> int | None:
        """Returns the exit code; None after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def processes(self) -> list[psutil.Process]:
        """Returns the command, its children, and those whose launcher was killed: their commands name the output."""
        pids = [self._process.pid] if self._process.poll() is None else []
        for process in psutil.process_iter(["cmdline"]):
            if not self._output_words.isdisjoint(process.info["cmdline"] or ()):
                pids.append(process.pid)
        return _with_children(pids)


class _ForkedCommand:
    """The forked ranks of a script."""

    def __init__(self, command: list[str], ranks: int, output: Path):
        script, *arguments = _with_output(command, output)
        self._ranks = forked_ranks.ForkedRanks(Path(script), arguments, output.with_suffix(".log"), ranks)
        self._ranks.start()
        self._failed_at = math.inf
        self._is_terminated = False

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits as a launcher does: ends the remaining ranks LAUNCHER_WAITS seconds after the first failure.

        The seconds count over all calls.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while None in (codes := self._ranks.wait(0)) and time.monotonic() < until:
            if any(codes):
                self._failed_at = min(self._failed_at, time.monotonic())
            if time.monotonic() > self._failed_at + LAUNCHER_WAITS and not self._is_terminated:
                for process in self.processes():
                    process.terminate()
                self._is_terminated = True
            time.sleep(0.05)
        return None if None in codes else next((code for code in codes if code), 0)

    def processes(self) -> list[psutil.Process]:
        return _with_children([rank.pid for rank in self._ranks.ranks])


def _with_children(pids: list[int]) -> list[psutil.Process]:
    """Returns those of the processes that still run, then their children, each once."""
    processes, children = {}, {}
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            below = [child for child in process.children(recursive=True) if TRACKER not in f"{child.cmdline()}"]
            children |= {child.pid: child for child in below if child.pid not in pids}
            processes[pid] = process
    return [*processes.values(), *children.values()]


def _run_once(
    run: _LaunchedCommand | _ForkedCommand, output: Path, how: str | None, after: float, generator: random.Random
) -> bool:
    """Kills a run after `after` seconds; returns True if it had already finished successfully."""
    code = run.wait(None if how is None else after)
    if code is None:
        if _kill(run, how, generator):
            return False
        code = run.wait()
    if code:
        raise CheckpointError(Problem(f"{output}", "exit code 0 after a restart", code, _log_hint(output)))
    return True


def _kill(run: _LaunchedCommand | _ForkedCommand, how: str, generator: random.Random) -> bool:
    """Sends the signal and waits until no process is left. CheckpointError if one is left after 120 s.

    Returns False if the run ended by itself in this moment.
    """
    processes = run.processes()
    if not processes:
        return False
    number = signal.SIGKILL if "SIGKILL" in how else signal.SIGTERM
    if how.endswith("all"):
        targets = processes
    else:
        targets = processes[:1] if how.endswith("first") else [generator.choice(processes)]
    for process in targets:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    if left := _wait_for_end(run, processes):
        names = [_describe_process(process) for process in left]
        _end(left)
        limit = f"all processes to end within {IDLE_LIMIT:g} s without use of the CPU"
        raise CheckpointError(Problem(how, limit, f"{names} of {len(processes)}"))
    return True


def _wait_for_end(run: _LaunchedCommand | _ForkedCommand, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Waits until these processes, and those that they start meanwhile, have ended; returns those that do not end."""
    known = {process.pid: process for process in processes}
    used, since, began = -1.0, time.monotonic(), time.monotonic()
    while True:
        code = run.wait(1.0)
        known |= {process.pid: process for process in run.processes()}
        left = [process for process in known.values() if _is_alive(process)]
        # One that ended after it was listed may have started another before.
        if not left and code is not None and not any(map(_is_alive, run.processes())):
            return []
        time.sleep(0.1)
        now = time.monotonic()
        if abs((seconds := sum(map(_cpu_seconds, left))) - used) > IDLE_CPU:
            used, since = seconds, now
        if now > min(since + IDLE_LIMIT, began + LIMIT):
            return left


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        return sum(process.cpu_times()[:2])
    return 0.0


def _describe_process(process: psutil.Process) -> str:
    """Returns which of a run's processes it is, and what it does."""
    with suppress(psutil.Error, OSError):
        waits_in = Path(f"/proc/{process.pid}/wchan").read_text()
        return f"{process.pid} ({process.status()} in {waits_in}): {' '.join(process.cmdline())}"
    return f"{process.pid}: ended meanwhile"


def _log_hint(output: Path) -> str:
    return f"See {output.with_suffix('.log')}*."
