"""Applies mutations and reads each result in child processes, with limits on memory and time."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from megatron_ligo.common.errors import CheckpointError, ConfigError, Problem, user_message
from megatron_ligo.testing.fuzz.mutators import MARK, MUTATIONS, OUTSIDE, Mutation
from megatron_ligo.testing.fuzz.run_samples import RUN_SAMPLES
from megatron_ligo.testing.fuzz.sample_files import SAMPLES, Sample

# Seconds of the CPU, or by the clock with less use of the CPU than IDLE_CPU.
TIMEOUT_SECONDS, IDLE_CPU = 60.0, 0.05
# Address space that reading a few kilobytes may add to that of the process.
EXTRA_BYTES = 1 << 30
# Mutations that one child process tries: a fork costs more than most of them.
BATCH = 32
# Mutations between two lines of progress.
PROGRESS = 1000
REFUSED, UNCHANGED, OTHER, NOTHING = "refused", "read unchanged", "read as edited", "nothing to mutate"
ALL_SAMPLES = (*SAMPLES, *RUN_SAMPLES)
HARMLESS = (REFUSED, UNCHANGED, OTHER, NOTHING)
GOOD, OTHER_NUMBERS, WORK = "good", "other", "work"

# Outcome and detail of a read: the content (UNCHANGED), the reason (REFUSED) or a failure.
Result = tuple[str, str]


@dataclass
class FuzzReport:
    """outcomes: number of mutations by outcome; by_sample: by the sample mutated; tried: numbers of mutations drawn."""

    outcomes: Counter = field(default_factory=Counter)
    by_sample: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    tried: int = 0

    @property
    def count(self) -> int:
        return self.outcomes.total()


def run_fuzz(
    folder: Path, count: int, seed: int, log_line: Callable[[str], None], samples: Iterable[Sample] = ALL_SAMPLES
) -> FuzzReport:
    """Tries `count` mutations. CheckpointError at the end if any did harm; the files of those stay in `folder`.

    ConfigError for a folder with files: some would be removed.
    """
    check_folder(folder, ())
    report = FuzzReport()
    samples = list(samples)
    expected = {sample.name: write_sample(sample, folder) for sample in samples}
    gc.freeze()
    while report.count < count:
        before = report.count
        numbers = range(report.tried, report.tried + min(BATCH, count - report.count))
        chosen = [samples[number % len(samples)] for number in numbers]
        calls = [
            partial(_try_mutation, sample, folder, f"{seed}:{number}", expected[sample.name])
            for sample, number in zip(chosen, numbers, strict=True)
        ]
        for sample, number, (outcome, detail) in zip(chosen, numbers, _call_in_child(calls), strict=False):
            report.tried += 1
            if outcome == NOTHING:
                continue
            report.outcomes[outcome] += 1
            report.by_sample[sample.name] += 1
            if outcome not in HARMLESS:
                story = _keep_trial(sample, folder, f"{seed}:{number}")
                report.errors.append(f"{seed}:{number} {sample.name}, {story}: {outcome}: {detail}")
                log_line(report.errors[-1])
        if report.count // PROGRESS > before // PROGRESS:
            log_line(f"{report.count} mutations tried, {len(report.errors)} harmful")
    shutil.rmtree(folder / WORK, ignore_errors=True)
    if report.errors:
        lines = "\n  ".join(report.errors)
        raise CheckpointError(f"{len(report.errors)} of {report.count} mutations did harm\n  {lines}")
    return report


def check_folder(folder: Path, own: Collection[str]) -> None:
    """Raises ConfigError for a folder with files, unless it has the samples and else only names of `own`."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(names - set(own))
    if names and (others or GOOD not in names):
        present = ", ".join((others or sorted(names))[:3])
        hint = "Choose another --output."
        raise ConfigError(Problem(f"--output {folder}", "a new folder", f"one with {present}", hint))


def write_sample(sample: Sample, folder: Path) -> str:
    """Writes a valid sample and one with other numbers. Returns what is read from the first."""
    results = []
    for number, name in enumerate((GOOD, OTHER_NUMBERS)):
        content = folder / name / sample.name
        content.mkdir(parents=True)
        sample.write(content, number)
        results += _call_in_child([partial(_read, sample, content)])
    unchanged = [kind for kind, _ in results] == [UNCHANGED, UNCHANGED]
    assert unchanged and results[0] != results[1], f"{sample.name}: {results}"
    return results[0][1]


def _mutate(sample: Sample, folder: Path, trial: Path, seed: str) -> tuple[Mutation, str | None]:
    """Writes TRIAL/content, a mutated sample, and TRIAL/outside, valid files of the same kind with other numbers."""
    draw = random.Random(seed)
    mutation = draw.choice(MUTATIONS)
    content = trial / "content"
    shutil.rmtree(content, ignore_errors=True)
    shutil.copytree(folder / GOOD / sample.name, content)
    if not (trial / OUTSIDE).exists():
        shutil.copytree(folder / OTHER_NUMBERS / sample.name, trial / OUTSIDE)
    return mutation, mutation.apply(draw, content)


def _keep_trial(sample: Sample, folder: Path, seed: str) -> str:
    """Writes the files of a harmful mutation for the user; returns its description."""
    mutation, story = _mutate(sample, folder, folder / f"tried_{seed.replace(':', '_')}", seed)
    return f"{mutation.name} ({story})"


def _try_mutation(sample: Sample, folder: Path, seed: str, expected: str) -> Result:
    """Returns the outcome of one mutation. Runs in a child process."""
    trial = folder / WORK / sample.name
    mutation, story = _mutate(sample, folder, trial, seed)
    if story is None:
        return NOTHING, ""
    outcome, detail = _read(sample, trial / "content")
    if (trial / MARK).exists():
        shutil.rmtree(trial / MARK)
        return "executed code from the file", outcome
    if outcome == UNCHANGED and detail != expected:
        return (OTHER if mutation.silent or sample.any_content else "silently misread"), ""
    return outcome, "" if outcome in HARMLESS else detail


def _read(sample: Sample, content: Path) -> Result:
    try:
        return UNCHANGED, repr(sample.read(content))
    except MemoryError:
        return "took too much memory", traceback.format_exc()
    except BaseException as error:
        reason = user_message(error)
        return (REFUSED, reason) if reason else ("an internal error", traceback.format_exc())


def _call_in_child(calls: Sequence[Callable[[], Result]]) -> Iterator[Result]:
    """Yields the result of each call, made one after another in one child; ends at one that hangs or ends the child."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receive.close()
        _child_main(calls, send)
    send.close()
    results, failure = 0, "hung"
    with receive:
        while results < len(calls) and _has_answer(receive, psutil.Process(child)):
            try:
                answer = receive.recv_bytes()
            except EOFError:
                failure = "died"
                break
            results += 1
            yield tuple(json.loads(answer))
    if results < len(calls) and failure == "hung":
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if results < len(calls):
        yield failure, f"{status}"


def _has_answer(receive: Connection, child: psutil.Process) -> bool:
    """Waits for an answer; False if the child uses TIMEOUT_SECONDS of the CPU first, or so long next to none of it.

    A busy machine may leave a sound child without the CPU for minutes.
    """
    first = used = sum(child.cpu_times()[:2])
    since = time.monotonic()
    while not receive.poll(1.0):
        seconds = sum(child.cpu_times()[:2])
        if seconds - used > IDLE_CPU:
            used, since = seconds, time.monotonic()
        if seconds - first > TIMEOUT_SECONDS or time.monotonic() - since > TIMEOUT_SECONDS:
            return False
    return True


def _child_main(calls: Sequence[Callable[[], Result]], answers: Connection) -> None:
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(quiet, number)
        limit = _address_space_bytes() + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for call in calls:
            answers.send_bytes(json.dumps(call()).encode())
            gc.collect()
    finally:
        os._exit(0)


def _address_space_bytes() -> int:
    """Returns the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
