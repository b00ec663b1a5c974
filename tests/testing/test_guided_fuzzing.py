"""The fuzzing of `ligo soak --fuzz`, driven by chance: a few hundred inputs, and proof that it detects each harm."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.common.file_digest import is_intact, seal
from megatron_ligo.testing.fuzz import fuzz_targets, guided_fuzzing, trials
from megatron_ligo.testing.fuzz.fuzz_targets import CODECS, TargetTrial, mutate_bytes
from megatron_ligo.testing.fuzz.sample_files import Sample

READ_HERE = ("gguf", "hf, torch file", "operator", "data", "tokenizer", "config", "report")
INPUTS = 16
HARM = {
    b"fall": "an internal error",
    b"fill": "took too much memory",
    b"wait": "took too long",
    b"die": "ended its process or hung",
}


def try_some(trial: TargetTrial, try_input: Callable[[bytes], None], corpus: Path, seconds: float, seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(INPUTS):
        try_input(mutate_bytes(draw, trial.first, 2 * len(trial.first)))


def fuzz(folder: Path) -> dict:
    samples = [sample for sample in trials.ALL_SAMPLES if sample.name in READ_HERE]
    assert len(samples) == len(READ_HERE)
    return guided_fuzzing.run_guided_fuzz(folder, 1, 0, print, try_some, samples)


def test_a_few_hundred_inputs_do_no_harm(forks, tmp_path):
    # In a fresh process: other tests leave a process group behind in this one.
    with ProcessPoolExecutor(1, mp_context=forks) as pool:
        tally = pool.submit(fuzz, tmp_path).result()
    assert len(tally) > 15 and all(entry.inputs == INPUTS for entry in tally.values())
    for part in ("operator.safetensors_header", "pytorch_model.bin_pickle", "operator.json_sealed"):
        assert any(name.endswith(part) for name in tally)
    assert not list((tmp_path / "findings").iterdir())


def read_and_obey(folder: Path) -> str:
    word = (folder / "file").read_bytes()
    if word == b"fall":
        raise KeyError(word)
    if word == b"fill":
        bytearray(100 << 20)
    if word == b"wait":
        until = time.process_time() + 2.5
        while time.process_time() < until:
            pass
    if word == b"die":
        os._exit(5)
    if word == b"refuse":
        raise ConfigError("it is refused")
    return word.decode("latin-1")


def test_each_kind_of_harm_is_kept_once(tmp_path, monkeypatch):
    def try_words(trial, try_input, corpus, seconds, seed):
        for word in (b"good", b"refuse", b"fall", b"fall", b"fill", b"wait", b"die"):
            try_input(word)

    monkeypatch.setattr(fuzz_targets, "SECONDS_LIMIT", 2.0)
    sample = Sample("words", lambda folder, seed: (folder / "file").write_text(f"good {seed}") and None, read_and_obey)
    for calls in (1, 2):
        with pytest.raises(CheckpointError, match="4 inputs did harm"):
            guided_fuzzing.run_guided_fuzz(tmp_path, 0, 0, print, try_words, [sample])
        (entry,) = json.loads((tmp_path / "fuzz.json").read_text()).values()
        assert entry["inputs"] == 7 * calls and entry["calls"] == calls and entry["cpu_seconds"] > 0
    listed = {}
    for path in (tmp_path / "findings").glob("*.txt"):
        listed[path.with_suffix(".bin").read_bytes()] = path.read_text().partition("\n")[0].partition(": ")[2]
    assert listed == HARM


def test_a_part_is_drawn_and_the_file_around_it_stays_valid(tmp_path):
    parts = {codec.name: codec for codec in CODECS}
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    (tmp_path / "a.json").write_text(json.dumps(seal({"a": 1})))
    for name, path in (("pickle", tmp_path / "a.pt"), ("sealed", tmp_path / "a.json")):
        content = path.read_bytes()
        path.write_bytes(parts[name].rebuild(content, parts[name].extract(path, content)))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].tolist() == [1, 1, 1]
    altered = json.loads(parts["sealed"].rebuild(b"", json.dumps({"a": 2}).encode()))
    assert altered["a"] == 2 and is_intact(altered)


def test_without_atheris_chance_draws(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(guided_fuzzing, "atheris_is_installed", lambda: False)
    sample = Sample("words", lambda folder, seed: (folder / "file").write_text(f"good {seed}") and None, read_and_obey)
    tally = guided_fuzzing.run_guided_fuzz(tmp_path, 0, 0, lines.append, samples=[sample])
    assert lines == ["1 targets, 0.0 s each, fuzz_by_chance"] and tally["words_file_whole"].inputs == 1
