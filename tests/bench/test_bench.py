"""Runs the benchmarks on sizes too small to measure anything, and checks their results."""

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
from megatron_ligo.arch import architectures, get
from megatron_ligo.bench import bench_families, synthetic_reader
from megatron_ligo.bench.steps.rank_pool import DIED_SILENTLY, RankProcesses
from megatron_ligo.common.errors import ConfigError
from tests.tiny_models import hf_llama, llama_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_bench(monkeypatch, capsys):
    """Runs tools/bench.py in this process and returns its standard output."""

    def run(*arguments: object) -> str:
        spec = spec_from_file_location("tool_bench", ROOT / "tools" / "bench.py")
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return run


def test_convert(run_bench, tmp_path):
    sizes = ("--gb", 0.005, "--peer-gb", 0, "--repeats", 1, "--to", "hf")
    output = tmp_path / "out" / "results.json"
    text = run_bench("convert", *sizes, "--folder", tmp_path / "disk", "--output", output)
    results = json.loads(output.read_text())
    path = results["paths"]["hf"]
    assert path["ratio"]["median"] == pytest.approx(results["cp_sync"]["seconds"][0] / path["seconds"][0])
    assert path["anonymous"]["peak"] < path["anonymous"]["limit"]
    assert "hf -> hf" in text
    assert list((tmp_path / "disk").iterdir()) == []


def test_families(run_bench, tmp_path):
    """A layout whose test failed is not on the page."""
    report, page = tmp_path / "report.xml", tmp_path / "page.md"
    test = "test_other_decoders_are_exact_when_sharded"
    report.write_text(
        f"""<testsuites><testsuite>
        <testcase name="{test}[qwen3-4-{{'tp': 2, 'pp': 2, 'sequence_parallel': True}}]"/>
        <testcase name="{test}[qwen3-4-{{'tp': 2, 'zero': 3}}]"><failure message="x"/></testcase>
        <testcase name="{test}[granite-2-{{'tp': 2}}]"/></testsuite></testsuites>"""
    )
    options = ("--family", "qwen3", "--tests", report, "--page", page, "--folder", tmp_path / "disk")
    text = run_bench("families", *options, "--output", tmp_path / "out.json")
    (family,) = json.loads((tmp_path / "out.json").read_text())["families"].values()
    assert family["gap"] < 1e-5
    assert {"hf", "mcore", "megatron", "universal"} <= set(family["there_and_back"])
    assert set(family["refused"]) == {"fairscale", "torchtitan"}
    assert (family["fit"], family["pretraining"]) == (["TP2 PP2 SP"], [])
    assert "| qwen3 | " in page.read_text() and "TP2 PP2 SP" in page.read_text()
    assert "qwen3" in text


@pytest.mark.parametrize("name", architectures())
def test_every_family_has_a_tiny_model(name):
    config = bench_families.family_config(name)
    params = [param for param in get(name).params if param.is_stored(config)]
    assert all(isinstance(size, int) and size > 0 for param in params for size in param.shape(config))


def test_grow(run_bench, tmp_path):
    sizes = ("--gb", 0.005, "--repeats", 1, "--threads", 1)
    output = tmp_path / "results.json"
    text = run_bench("grow", *sizes, "--folder", tmp_path / "disk", "--output", output)
    results = json.loads(output.read_text())
    path = results["paths"]["learned"]
    assert path["ratio"]["median"] == pytest.approx(path["dd_seconds"][0] / path["seconds"][0])
    floor = max(path["dd_seconds"][0], path["compute_seconds"][0])
    assert path["of_floor"]["median"] == pytest.approx(floor / path["seconds"][0]) and path["compute_seconds"][0] > 0
    assert path["bytes"] == pytest.approx(results["paths"]["copies"]["bytes"], rel=0.05)
    assert "learned" in text
    assert list((tmp_path / "disk").iterdir()) == []


def test_data(run_bench, tmp_path):
    """The benchmark asserts that both sides write the same files."""
    output = tmp_path / "results.json"
    sizes = ("--mb", 0.3, "--vocab", 500, "--repeats", 1, "--workers", 2)
    text = run_bench("data", *sizes, "--folder", tmp_path / "disk", "--output", output)
    results = json.loads(output.read_text())
    assert results["text_bytes"] > 300_000 and results["rate_over_peer"]["median"] > 0
    assert "0 MB of text, 2 workers" in text
    assert list((tmp_path / "disk").iterdir()) == []


def test_plan(run_bench, tmp_path):
    output = tmp_path / "results.json"
    text = run_bench("plan", "--case", "fit, rank 32", "--folder", tmp_path, "--output", output)
    (stage,) = json.loads(output.read_text())["cases"]["fit, rank 32"]
    assert stage["ratio"] == pytest.approx(sum(stage["planned"].values()) / stage["measured"], abs=1e-3)
    assert f"{stage['ratio']:.2f} of" in text


def test_guard(run_bench, tmp_path):
    """A spike and a held-out loss that rises are severe; a change that was accepted begins anew."""
    rows = [{"step": step, "loss": 3.0, "grad_norm": 1.0} for step in range(1, 61)]
    rows[29]["loss"], rows[39]["eval_loss"], rows[49]["eval_loss"] = 6.0, 2.9, 5.5
    sound = [{"step": step, "loss": 3.0 if step < 30 else 5.0, "grad_norm": 1.0} for step in range(1, 61)]
    sound[29]["accepted_changes"] = "data/train.bin"
    for name, content in (("bad", rows), ("sound", sound)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    output = tmp_path / "results.json"
    text = run_bench("guard", tmp_path / "bad", tmp_path / "sound", "--classes", 300, "--output", output)
    bad, sound = json.loads(output.read_text())["runs"].values()
    assert bad["severe"] == [[30, "loss"], [50, "held-out loss"]] and bad["steps"] == 60
    assert sound["severe"] == sound["reported"] == []
    assert "120       2         0  in all" in text


def test_layouts_whose_kernels_cannot_be_counted_are_one_error(run_bench, tmp_path):
    hf_llama(llama_config()).save_pretrained(tmp_path / "small")
    config = tmp_path / "run.toml"
    config.write_text(f'small.path = "{tmp_path}/small"\nlarge.num_layers = 4\ndata.seq_length = 16\n')

    def refuse(*options: object) -> str:
        with pytest.raises(ConfigError) as refusal:
            run_bench("kernels", "--config", config, *options)
        return str(refusal.value)

    text = refuse(
        "--world", 6, "--set", "fit.parallel.tp=3", "--set", "pretrain.parallel.pp=2", "--set", "operator.rank=4"
    )
    assert "[fit] tp = 3: expected a divisor of the model's ffn_size, found ffn_size = 28." in text
    assert "[pretrain] pp: expected 1: stages are not counted, found 2." in text
    assert "operator.rank: expected 0: low-rank maps are not counted, found 4." in text
    assert "[pretrain] number of processes: expected a multiple of tp x pp = 4, found 3." in refuse(
        "--world", 3, "--kind", "plain", "--set", "pretrain.parallel.tp=4"
    )
    assert refuse("--world", 0) == "--processes: expected at least 1, found 0."


def test_every_benchmark_is_one_module_with_the_whole_interface():
    files = {file.stem.removeprefix("bench_") for file in (ROOT / "megatron_ligo" / "bench").glob("bench_*.py")}
    summaries = bench.describe_benchmarks()
    assert set(summaries) == files
    for name, summary in summaries.items():
        module = bench.load_benchmark(name)
        assert summary == module.HELP
        assert callable(module.add_arguments)
        assert callable(module.measure)
        assert callable(module.format_text)


@pytest.mark.parametrize("gb", [0.3, 1, 4, 20])
def test_the_synthetic_model_has_the_requested_size(gb):
    model_config = synthetic_reader.synthetic_llama_config(gb * 1e9)
    reader = synthetic_reader.SyntheticReader(model_config)
    shapes = [reader.info(key).shape for key in reader.keys()]  # noqa: SIM118 - no dict
    assert 4 * sum(map(math.prod, shapes)) == pytest.approx(gb * 1e9, rel=0.1)
    assert model_config.num_layers >= synthetic_reader.MIN_LAYERS


class FailingRank:
    """The second rank raises or is killed while the first waits for it."""

    def __init__(self, killed: bool):
        if dist.get_rank() == 1:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("too wide")
        dist.barrier()


# Much less than the process group's own time-out.
@pytest.mark.timeout(120)
def test_an_exception_on_a_rank_is_reported():
    with pytest.raises(RuntimeError) as error:
        RankProcesses(2, FailingRank, killed=False)
    assert str(error.value).startswith("rank 1:")
    assert "ValueError: too wide" in str(error.value)


@pytest.mark.timeout(120)
def test_a_killed_rank_is_reported():
    with pytest.raises(RuntimeError) as error:
        RankProcesses(2, FailingRank, killed=True)
    rank, _, message = str(error.value).partition(":\n")
    # The surviving rank may report its broken connection first.
    assert rank in ("rank 0", "rank 1")
    assert rank == "rank 0" or message == DIED_SILENTLY
