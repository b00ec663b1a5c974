"""Conversions that are killed at any moment resume to the same bytes, in any format; memory stays bounded."""

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
# Bytes besides two of the largest tensor: those that may wait to be written (128 MB), and Python's own.
ALLOWANCE = 170e6


class Process:
    """Runs a case in a process of its own."""

    def __init__(self, context, case: Callable, *arguments: str | None):
        self.pipe, child_end = context.Pipe()
        self.process = context.Process(target=case, args=(child_end, *arguments), daemon=True)
        self.process.start()
        child_end.close()

    def answer(self):
        assert self.pipe.poll(200), "no answer"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def workspace():
    """A folder in memory where the machine has one: its pages count as a file's."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("to", formats.writers())
def test_killed_at_random_moments(workspace, forks, to):
    _, folder = hf_models.saved(workspace / "a", num_hidden_layers=12, head_dim=8)

    def start(target: Path) -> Process:
        process = Process(forks, convert_cases.convert_slowly, str(folder), str(target), to)
        assert process.answer() == "started"
        return process

    process, start_time = start(workspace / "whole"), time.perf_counter()
    assert process.answer() == "ended"
    seconds = time.perf_counter() - start_time
    expected = snapshot(workspace / "whole")
    target, draw = workspace / "b", random.Random(to)
    most_entries = 0
    for _ in range(KILLS):
        process = start(target)
        time.sleep(draw.uniform(0.0, seconds / 2))
        process.kill()
        if target.exists():
            break
        journal = workspace / ".b.partial" / "journal.jsonl"
        most_entries = max(most_entries, len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    assert most_entries > 10, "no kill interrupted the work"
    assert start(target).answer() == "ended"
    assert snapshot(target) == expected
    assert sorted(file.name for file in workspace.iterdir()) == ["a", "b", "whole"]


@pytest.mark.parametrize("to", formats.writers())
def test_memory_does_not_grow_with_the_model(workspace, forks, to):
    """From a computed model to a format, and from its files to Hugging Face's."""
    peak_there = Process(forks, convert_cases.convert_and_measure, None, str(workspace / "there"), to).answer()
    peak_back = Process(
        forks, convert_cases.convert_and_measure, str(workspace / "there"), str(workspace / "back"), "hf"
    ).answer()
    reader = SyntheticReader(LARGE)
    sizes = [4 * math.prod(reader.info(key).shape) for key in reader.keys()]  # noqa: SIM118 - no dict
    limit = 2 * max(sizes) + ALLOWANCE
    assert limit < sum(sizes) * 0.7, "a converter that holds the whole model would pass"
    assert peak_there < limit
    assert peak_back < limit
    assert formats.open(workspace / "back").model_config == LARGE
