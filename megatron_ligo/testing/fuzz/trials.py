"""Many changes, each tried in a process of its own: with a limit to its memory and its time, and watched."""

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
from megatron_ligo.testing.fuzz.mutators import CHANGES, MARK, OUTSIDE, Change
from megatron_ligo.testing.fuzz.sample_files import SAMPLES, Sample

SECONDS = 60.0
# More than a reader of a few kilobytes may ever want, on top of what the process has.
BYTES = 1 << 30
REFUSED, SAME, OTHER = "refused", "nothing changed", "other content, as it says"


@dataclass
class Tally:
    """outcomes: how many changes ended how; by_sample: by what was changed."""

    outcomes: Counter = field(default_factory=Counter)
    by_sample: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.outcomes.total()


def mutate(
    folder: Path, count: int, seed: int, tell: Callable[[str], None], samples: Iterable[Sample] = SAMPLES
) -> Tally:
    """Tries so many changes. CheckpointError at the end if any did harm; what did is left in `folder`."""
    tally, number = Tally(), 0
    samples = list(samples)
    expected = {sample.name: _made(sample, folder) for sample in samples}
    while tally.tried < count:
        sample = samples[number % len(samples)]
        outcome, story = _one(sample, folder, f"{seed}:{number}", expected[sample.name])
        number += 1
        if outcome is None:
            continue
        tally.outcomes[outcome] += 1
        tally.by_sample[sample.name] += 1
        if outcome not in (REFUSED, SAME, OTHER):
            tally.errors.append(f"{seed}:{number - 1} {sample.name}, {story}: {outcome}")
            tell(tally.errors[-1])
    if tally.errors:
        lines = "\n  ".join(tally.errors)
        raise CheckpointError(f"{len(tally.errors)} of {tally.tried} changes did harm\n  {lines}")
    return tally


def _made(sample: Sample, folder: Path) -> str:
    """A good one, and another with other numbers. What is read of the good one."""
    found = []
    for number, name in enumerate(("good", "other")):
        place = folder / name / sample.name
        place.mkdir(parents=True)
        sample.make(place, number)
        found.append(_tried(sample, place))
    assert [kind for kind, _ in found] == [SAME, SAME] and found[0] != found[1], f"{sample.name}: {found}"
    return found[0][1]


def _one(sample: Sample, folder: Path, seed: str, expected: str) -> tuple[str | None, str]:
    """What came of one change (None: it changed nothing), and what it was."""
    draw = random.Random(seed)
    change: Change = draw.choice(CHANGES)
    place = folder / f"tried_{seed.replace(':', '_')}"
    content = place / "content"
    shutil.copytree(folder / "good" / sample.name, content)
    shutil.copytree(folder / "other" / sample.name, place / OUTSIDE)
    story = change.work(draw, content)
    if story is None:
        shutil.rmtree(place)
        return None, ""
    kind, found = _tried(sample, content)
    if (place / MARK).exists():
        kind = f"ran a program of the file ({kind})"
    elif kind == SAME and found != expected:
        kind = OTHER if change.silent or sample.name == "config" else "read as something else, without a word"
    elif kind not in (SAME, REFUSED):
        kind = f"{kind}: {found}"
    if kind in (SAME, REFUSED, OTHER):
        shutil.rmtree(place)
    return kind, f"{change.name} ({story})"


def _tried(sample: Sample, content: Path) -> tuple[str, str]:
    """(SAME, what was read), (REFUSED, why) or (another end, its last words), out of a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _child(sample, content, write)
    os.close(write)
    answer, late, deadline = b"", False, time.monotonic() + SECONDS
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


def _child(sample: Sample, content: Path, answer: int) -> None:
    kind, text = "died", ""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(quiet, number)
        limit = _held() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        kind, text = SAME, repr(sample.look(content))
    except MemoryError:
        kind, text = "took too much memory", traceback.format_exc()
    except BaseException as error:
        told = user_message(error)
        kind, text = (REFUSED, told) if told else ("an error of ours", traceback.format_exc())
    try:
        with os.fdopen(answer, "wb") as pipe:
            pipe.write(json.dumps([kind, text]).encode())
    finally:
        os._exit(0)


def _held() -> int:
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
