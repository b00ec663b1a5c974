"""Applies mutations and reads each result in its own process, with limits on memory and time."""

from __future__ import annotations

import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ligo.common.errors import CheckpointError, user_message
from megatron_ligo.testing.fuzz.mutators import MARK, MUTATIONS, OUTSIDE, Mutation
from megatron_ligo.testing.fuzz.sample_files import SAMPLES, Sample

TIMEOUT_SECONDS = 60.0
# Address space that reading a few kilobytes may add to that of the process.
EXTRA_BYTES = 1 << 30
REFUSED, UNCHANGED, OTHER = "refused", "read unchanged", "read as edited"


@dataclass
class FuzzReport:
    """outcomes: number of mutations by outcome; by_sample: by the sample mutated."""

    outcomes: Counter = field(default_factory=Counter)
    by_sample: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.outcomes.total()


def run_fuzz(
    folder: Path, count: int, seed: int, log_line: Callable[[str], None], samples: Iterable[Sample] = SAMPLES
) -> FuzzReport:
    """Tries `count` mutations. CheckpointError at the end if any did harm; the files of those stay in `folder`."""
    report, number = FuzzReport(), 0
    samples = list(samples)
    expected = {sample.name: _write_samples(sample, folder) for sample in samples}
    while report.count < count:
        sample = samples[number % len(samples)]
        outcome, story = _try_mutation(sample, folder, f"{seed}:{number}", expected[sample.name])
        number += 1
        if outcome is None:
            continue
        report.outcomes[outcome] += 1
        report.by_sample[sample.name] += 1
        if outcome not in (REFUSED, UNCHANGED, OTHER):
            report.errors.append(f"{seed}:{number - 1} {sample.name}, {story}: {outcome}")
            log_line(report.errors[-1])
    if report.errors:
        lines = "\n  ".join(report.errors)
        raise CheckpointError(f"{len(report.errors)} of {report.count} mutations did harm\n  {lines}")
    return report


def _write_samples(sample: Sample, folder: Path) -> str:
    """Writes a valid sample and one with other numbers. Returns what is read from the first."""
    outcomes = []
    for number, name in enumerate(("good", "other")):
        content = folder / name / sample.name
        content.mkdir(parents=True)
        sample.write(content, number)
        outcomes.append(_read_in_child(sample, content))
    unchanged = [kind for kind, _ in outcomes] == [UNCHANGED, UNCHANGED]
    assert unchanged and outcomes[0] != outcomes[1], f"{sample.name}: {outcomes}"
    return outcomes[0][1]


def _try_mutation(sample: Sample, folder: Path, seed: str, expected: str) -> tuple[str | None, str]:
    """Returns the outcome of one mutation (None: it found nothing to mutate) and its description."""
    draw = random.Random(seed)
    mutation: Mutation = draw.choice(MUTATIONS)
    trial = folder / f"tried_{seed.replace(':', '_')}"
    content = trial / "content"
    shutil.copytree(folder / "good" / sample.name, content)
    shutil.copytree(folder / "other" / sample.name, trial / OUTSIDE)
    story = mutation.apply(draw, content)
    if story is None:
        shutil.rmtree(trial)
        return None, ""
    outcome, detail = _read_in_child(sample, content)
    if (trial / MARK).exists():
        outcome = f"executed code from the file ({outcome})"
    elif outcome == UNCHANGED and detail != expected:
        outcome = OTHER if mutation.silent or sample.name == "config" else "silently misread"
    elif outcome not in (UNCHANGED, REFUSED):
        outcome = f"{outcome}: {detail}"
    if outcome in (UNCHANGED, REFUSED, OTHER):
        shutil.rmtree(trial)
    return outcome, f"{mutation.name} ({story})"


def _read_in_child(sample: Sample, content: Path) -> tuple[str, str]:
    """Reads in a child process. Returns (UNCHANGED, content), (REFUSED, reason) or (failure, detail)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child_main(sample, content, write)
    os.close(write)
    answer, late, deadline = b"", False, time.monotonic() + TIMEOUT_SECONDS
    while not late:
        if select.select([read], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = os.read(read, 1 << 16)
            if not part:
                break
            answer += part
        late = time.monotonic() > deadline
    if late:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if answer and status == 0:
        return tuple(json.loads(answer))
    return ("hung" if late else "died"), f"{status}"


def _child_main(sample: Sample, content: Path, answer: int) -> None:
    kind, text = "died", ""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(quiet, number)
        limit = _address_space_bytes() + EXTRA_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        kind, text = UNCHANGED, repr(sample.read(content))
    except MemoryError:
        kind, text = "took too much memory", traceback.format_exc()
    except BaseException as error:
        reason = user_message(error)
        kind, text = (REFUSED, reason) if reason else ("an internal error", traceback.format_exc())
    try:
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(json.dumps([kind, text]).encode())
    finally:
        os._exit(0)


def _address_space_bytes() -> int:
    """Returns the bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
