"""Runs on real GPUs: skipped where there is none. Each run is a command of its own, as this process uses the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.tiny_models import hf_llama, llama_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"hidden_size": 48, "ffn_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12, "vocab_size": 256}
CONFIG = """
[small]
path = "{folder}/small"
[large]
num_layers = 4
hidden_size = 96
ffn_size = 192
num_heads = 8
num_kv_heads = 4
[fit]
steps = 6
save_every = 3
[pretrain]
steps = 6
save_every = 3
[data]
train = ["{folder}/train"]
valid = ["{folder}/valid"]
seq_length = 32
"""


@cache
def num_gpus() -> int:
    """Counts the GPUs that torch can use, in a process of its own, which keeps no device open."""
    script = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    return int(result.stdout or 0)


def pytest_collection_modifyitems(items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if here and not num_gpus():
        for item in here:
            item.add_marker(pytest.mark.skip(reason="no GPU that torch can use"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A small model, its data and run.toml."""
    path = tmp_path_factory.mktemp("gpu")
    hf_llama(llama_config(tied=True, **SIZES)).save_pretrained(path / "small")
    for seed, name in enumerate(("train", "valid")):
        random = np.random.default_rng(seed)
        builder = IndexedDatasetBuilder(f"{path / name}.bin", dtype=np.uint16)
        for _ in range(60):
            ids = random.integers(0, SIZES["vocab_size"], 300)
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{path / name}.idx")
    (path / "run.toml").write_text(CONFIG.format(folder=path))
    return path


Runner = Callable[..., list[dict]]


@pytest.fixture(scope="session")
def run(folder) -> Runner:
    """`run(tool, output, *settings, accelerator, ranks)` runs a command to its end and returns its metrics by step."""

    def run_tool(tool: str, output: str, *settings: str, accelerator: str = "cuda", ranks: int = 0) -> list[dict]:
        environment = {**os.environ, "DS_ACCELERATOR": accelerator, "PYTHONPATH": str(ROOT)}
        command = [str(ROOT / f"tools/{tool}.py"), "--config", str(folder / "run.toml"), "--output"]
        command += [str(folder / output), *(part for setting in settings for part in ("--set", setting))]
        launcher = [shutil.which("deepspeed"), "--num_gpus", str(ranks)] if ranks else [sys.executable]
        result = subprocess.run(
            launcher + command, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return [json.loads(line) for line in (folder / output / "metrics.jsonl").read_text().splitlines()]

    return run_tool
