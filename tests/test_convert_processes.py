"""Conversions that are killed at any moment go on to the same bytes; memory stays bounded."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ligo import formats
from megatron_ligo.convert import convert
from tests.convert_cases import Drawn
from tests.formats import models

ROOT = Path(__file__).parents[1]
KILLS = 10


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.convert_cases", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> dict:
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("to", ["hf", "universal"])
@pytest.mark.timeout(600)
def test_killed_at_random_moments(tmp_path, to):
    _, folder = models.saved(tmp_path / "a", num_hidden_layers=12)
    finish(start("slow", folder, tmp_path / "whole", to))
    expected = snapshot(tmp_path / "whole")
    target, draw = tmp_path / "b", random.Random(to)
    went_on = 0
    for _ in range(KILLS):
        process = start("slow", folder, target, to)
        assert process.stdout.readline() == "started\n"
        time.sleep(draw.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=60)
        if target.exists():
            break
        journal = tmp_path / ".b.partial" / "journal.jsonl"
        went_on = max(went_on, len(journal.read_bytes().splitlines()) if journal.exists() else 0)
    assert went_on > 10, "no kill came in the midst of the work"
    finish(start("slow", folder, target, to))
    assert snapshot(target) == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "whole"]


@pytest.mark.parametrize(("first", "to"), [(None, "hf"), (None, "universal"), ("hf", "hf"), ("hf", "universal")])
def test_memory_does_not_grow_with_the_model(tmp_path, first, to):
    """560 MB, of which 164 MB are one tensor: computed, and read from files."""
    source = "drawn"
    if first:
        source = tmp_path / "a"
        convert(Drawn(1024, 4, 40_000), source, first)
    found = finish(start("watched", source, tmp_path / "b", to))
    assert found["peak"] < 2 * found["largest"] + 300e6
    if first:
        # Nothing is copied on the way from file to file.
        assert found["peak"] < found["largest"]
    assert formats.open(tmp_path / "b").dims == Drawn(1024, 4, 40_000).dims
