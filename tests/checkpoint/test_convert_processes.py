"""Conversions to any format that are killed at any moment go on to the same bytes; memory stays bounded."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ligo.bench.synthetic_reader import SyntheticReader
from megatron_ligo.checkpoint import formats
from tests.checkpoint import convert_cases, hf_models
from tests.checkpoint.convert_cases import LARGE

KILLS = 10
# Besides two of the largest tensor: what may wait to be written (128 MB), and Python's own.
MORE = 170e6


class Process:
    """A case in a process of its own."""

    def __init__(self, context, case: Callable, *arguments: str | None):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=case, args=(theirs, *arguments), daemon=True)
        self.process.start()
        theirs.close()

    def answer(self):
        assert self.pipe.poll(200), "no answer"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def place():
    """In memory where the machine has such a disk: its pages are a file's as on any other."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("to", formats.writers())
def test_killed_at_random_moments(place, forks, to):
    _, folder = hf_models.saved(place / "a", num_hidden_layers=12, head_dim=8)

    def start(target: Path) -> Process:
        process = Process(forks, convert_cases.slow, str(folder), str(target), to)
        assert process.answer() == "started"
        return process

    process, begun = start(place / "whole"), time.perf_counter()
    assert process.answer() == "ended"
    seconds = time.perf_counter() - begun
    expected = snapshot(place / "whole")
    target, draw = place / "b", random.Random(to)
    went_on = 0
    for _ in range(KILLS):
        process = start(target)
        time.sleep(draw.uniform(0.0, seconds / 4))
        process.kill()
        if target.exists():
            break
        journal = place / ".b.partial" / "journal.jsonl"
        went_on = max(went_on, len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    assert went_on > 10, "no kill came in the midst of the work"
    assert start(target).answer() == "ended"
    assert snapshot(target) == expected
    assert sorted(file.name for file in place.iterdir()) == ["a", "b", "whole"]


@pytest.mark.parametrize("to", formats.writers())
def test_memory_does_not_grow_with_the_model(place, forks, to):
    """Computed to a format, and from its files to Hugging Face's."""
    there = Process(forks, convert_cases.watched, None, str(place / "there"), to).answer()
    back = Process(forks, convert_cases.watched, str(place / "there"), str(place / "back"), "hf").answer()
    drawn = SyntheticReader(LARGE)
    sizes = [4 * math.prod(drawn.info(key).shape) for key in drawn.keys()]  # noqa: SIM118 - no dict
    limit = 2 * max(sizes) + MORE
    assert limit < sum(sizes) * 0.7, "a converter that holds the model would pass"
    assert there < limit
    assert back < limit
    assert formats.open(place / "back").model_config == LARGE
