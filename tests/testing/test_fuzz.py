"""A short run of `tools/soak.py --mutations`, and proof that it sees what it looks for."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.testing.fuzz import mutators, trials
from megatron_ligo.testing.fuzz.sample_files import SAMPLES, Sample

TRIED = 128
HARM = {
    "run": "ran a program of the file",
    "wait": "hung",
    "fill": "took too much memory",
    "fall": "an error of ours",
    "die": "died: -9",
    "other": "read as something else, without a word",
}


def test_no_change_does_harm(forks, tmp_path):
    # In a process of its own: other tests leave a process group behind in this one.
    with ProcessPoolExecutor(1, mp_context=forks) as pool:
        tally = pool.submit(trials.mutate, tmp_path, TRIED, 0, print).result()
    assert tally.tried == TRIED and not tally.errors
    assert set(tally.by_sample) == {sample.name for sample in SAMPLES}
    assert tally.outcomes[trials.REFUSED] > TRIED / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "other"]


def believing(folder: Path) -> str:
    """Does what it reads."""
    word = (folder / "file").read_text()
    if word == "run":
        (folder.parent / mutators.MARK).mkdir()
    elif word == "wait":
        time.sleep(60)
    elif word == "fill":
        bytearray(1 << 40)
    elif word == "fall":
        raise KeyError(word)
    elif word == "die":
        os.kill(os.getpid(), 9)
    return word


@pytest.mark.parametrize("word", HARM)
def test_what_does_harm_is_seen(tmp_path, monkeypatch, word):
    def change(draw: object, folder: Path) -> str:
        (folder / "file").write_text(word)
        return word

    monkeypatch.setattr(trials, "CHANGES", [mutators.Change("a word", change)])
    monkeypatch.setattr(trials, "SECONDS", 3.0)
    sample = Sample("words", lambda folder, seed: (folder / "file").write_text(f"good {seed}") and None, believing)
    with pytest.raises(CheckpointError, match=HARM[word]):
        trials.mutate(tmp_path, 1, 0, print, [sample])
    assert (tmp_path / "tried_0_0/content/file").read_text() == word
