"""The measurements run, on sizes that measure nothing, and say what they found."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ligo import bench
from megatron_ligo.bench import synthetic_reader
from megatron_ligo.bench.steps.rank_pool import RankProcesses

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(monkeypatch, capsys):
    """tools/bench.py in this process."""

    def run(*arguments: object) -> str:
        spec = spec_from_file_location("tool_bench", ROOT / "tools" / "bench.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_convert(command, tmp_path):
    sizes = ("--gb", 0.005, "--peer-gb", 0, "--repeats", 1, "--to", "hf")
    told = command("convert", *sizes, "--folder", tmp_path / "disk", "--output", tmp_path / "out" / "found.json")
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    path = found["paths"]["hf"]
    assert path["ratio"]["median"] == pytest.approx(found["cp_sync"]["seconds"][0] / path["seconds"][0])
    assert path["anonymous"]["peak"] < path["anonymous"]["limit"]
    assert "hf -> hf" in told
    assert list((tmp_path / "disk").iterdir()) == []


def test_grow(command, tmp_path):
    sizes = ("--gb", 0.005, "--repeats", 1, "--threads", 1)
    told = command("grow", *sizes, "--folder", tmp_path / "disk", "--output", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    path = found["paths"]["learned"]
    assert path["ratio"]["median"] == pytest.approx(path["dd_seconds"][0] / path["seconds"][0])
    assert path["bytes"] == pytest.approx(found["paths"]["copies"]["bytes"], rel=0.05)
    assert "learned" in told
    assert list((tmp_path / "disk").iterdir()) == []


def test_plan(command, tmp_path):
    told = command("plan", "--case", "fit, rank 32", "--folder", tmp_path, "--output", tmp_path / "found.json")
    (stage,) = json.loads((tmp_path / "found.json").read_text())["cases"]["fit, rank 32"]
    assert stage["ratio"] == pytest.approx(sum(stage["planned"].values()) / stage["measured"], abs=1e-3)
    assert f"{stage['ratio']:.2f} of" in told


def test_a_measurement_is_one_file():
    files = {file.stem.removeprefix("bench_") for file in (ROOT / "megatron_ligo" / "bench").glob("bench_*.py")}
    assert set(bench.load_measurements()) == files
    for module in bench.load_measurements().values():
        assert module.HELP
        assert callable(module.arguments)
        assert callable(module.as_text)


@pytest.mark.parametrize("gb", [0.3, 1, 4, 20])
def test_the_synthetic_model_has_the_size_that_is_asked_for(gb):
    model_config = synthetic_reader.synthetic_llama_config(gb * 1e9)
    reader = synthetic_reader.SyntheticReader(model_config)
    shapes = [reader.info(key).shape for key in reader.keys()]  # noqa: SIM118 - no dict
    assert 4 * sum(map(math.prod, shapes)) == pytest.approx(gb * 1e9, rel=0.1)
    assert model_config.num_layers >= synthetic_reader.MIN_LAYERS


class OneFails:
    """The second rank fails, or is killed, where the first waits for it."""

    def __init__(self, killed: bool):
        if dist.get_rank() == 1:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("too wide")
        dist.barrier()


# Heard of late, it would be after the ranks' own time-out of some minutes.
@pytest.mark.timeout(120)
@pytest.mark.parametrize("killed, words", [(False, "(?s)rank 1.*too wide"), (True, "rank [01]")])
def test_a_rank_that_fails_is_told(killed, words):
    with pytest.raises(RuntimeError, match=words):
        RankProcesses(2, OneFails, killed=killed)
