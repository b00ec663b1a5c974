"""Fixtures of the reliability tests: a small model, text, a config, and undisturbed runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.reliability.commands import Run
from tests.tiny_models import hf_llama, llama_config
from tests.training.test_pretrain import make_pair

SMALL = llama_config(tied=True, num_layers=2, hidden_size=24, num_heads=8, num_kv_heads=4, ffn_size=28)
STEPS, SAVE_EVERY = 16, 4
CONFIG = """
[small]
path = "{base}/small"
[large]
num_layers = 4
hidden_size = 32
ffn_size = 44
num_heads = 16
num_kv_heads = 8
[fit]
steps = {steps}
save_every = {save_every}
warmup_steps = 2
lr = 1e-3
[pretrain]
steps = {steps}
save_every = {save_every}
warmup_steps = 2
start = "{base}/small"
[data]
train = ["{base}/train"]
valid = ["{base}/valid"]
seq_length = 12
"""


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A small model, text, and run.toml."""
    folder = tmp_path_factory.mktemp("faults")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    hf_llama(SMALL).save_pretrained(folder / "small")
    (folder / "run.toml").write_text(CONFIG.format(base=folder, steps=STEPS, save_every=SAVE_EVERY))
    return folder


@pytest.fixture(scope="session")
def config(base) -> Path:
    return base / "run.toml"


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> Callable[..., Path]:
    """Returns `whole(tool, *sets, world=2)`, which gives the folder of an undisturbed run, run once."""

    @cache
    def run_once(tool: str, *sets: str, world: int = 2) -> Path:
        output = tmp_path_factory.mktemp("whole") / "run"
        with Run(tool, config, output, *sets, world=world) as run:
            assert run.exit_codes() == [0] * world, run.stderr(0)
        return output

    return run_once
