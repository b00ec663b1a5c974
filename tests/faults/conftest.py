"""What the runs in this folder stand on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import hf_llama, llama_dims
from tests.training.test_pretrain import make_pair

SMALL = llama_dims(tied=True, num_layers=2, hidden_size=24, num_heads=8, num_kv_heads=4, ffn_size=28)
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
steps = 30
save_every = 4
warmup_steps = 2
lr = 1e-3
[pretrain]
steps = 30
save_every = 4
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
    (folder / "run.toml").write_text(CONFIG.format(base=folder))
    return folder


@pytest.fixture(scope="session")
def config(base) -> Path:
    return base / "run.toml"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system of its own could be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=False)
