"""A short run of `tools/soak.py --mutations`, and proof that it detects each kind of harm."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.testing.fuzz import mutators, trials
from megatron_ligo.testing.fuzz.sample_files import Sample

COUNT = 128
HARM = {
    "run": "executed code from the file",
    "wait": "hung",
    "fill": "took too much memory",
    "fall": "an internal error",
    "die": "died: -9",
    "other": "silently misread",
}


def test_no_mutation_does_harm(forks, tmp_path):
    # In a fresh process: other tests leave a process group behind in this one.
    with ProcessPoolExecutor(1, mp_context=forks) as pool:
        report = pool.submit(trials.run_fuzz, tmp_path, COUNT, 0, print).result()
    assert report.count == COUNT and not report.errors
    assert set(report.by_sample) == {sample.name for sample in trials.ALL_SAMPLES}
    assert report.outcomes[trials.REFUSED] > COUNT / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "other"]


def read_and_obey(folder: Path) -> str:
    """Does what the file says."""
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
def test_each_kind_of_harm_is_detected(tmp_path, monkeypatch, word):
    def write_word(draw: object, folder: Path) -> str:
        (folder / "file").write_text(word)
        return word

    monkeypatch.setattr(trials, "MUTATIONS", [mutators.Mutation("a word", write_word)])
    monkeypatch.setattr(trials, "TIMEOUT_SECONDS", 3.0)
    sample = Sample("words", lambda folder, seed: (folder / "file").write_text(f"good {seed}") and None, read_and_obey)
    with pytest.raises(CheckpointError) as raised:
        trials.run_fuzz(tmp_path, 1, 0, print, [sample])
    assert HARM[word] in str(raised.value)
    assert (tmp_path / "tried_0_0/content/file").read_text() == word


def test_a_child_without_the_cpu_does_not_hang(monkeypatch):
    """It works a little, and then waits, as on a busy machine: longer than the limit, which counts its own work."""

    def work_now_and_then() -> trials.Result:
        for _ in range(10):
            until = time.process_time() + 0.1
            while time.process_time() < until:
                pass
            time.sleep(0.3)
        return trials.UNCHANGED, "done"

    monkeypatch.setattr(trials, "TIMEOUT_SECONDS", 3.0)
    assert list(trials._call_in_child([work_now_and_then])) == [(trials.UNCHANGED, "done")]


def test_a_child_that_works_for_ever_hangs(monkeypatch):
    monkeypatch.setattr(trials, "TIMEOUT_SECONDS", 1.0)
    (outcome,) = trials._call_in_child([lambda: any(iter(int, 1)) or (trials.UNCHANGED, "")])
    assert outcome == ("hung", "-9")
