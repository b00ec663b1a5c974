"""Fits and pretraining runs on real GPUs, against the same runs on the CPU."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.planning.layout_search import plan_layout
from megatron_ligo.planning.run_plan import plan_run
from tests.gpu.conftest import num_gpus

pytestmark = pytest.mark.gpu
SCRATCH = 'pretrain.start="scratch"'
TOOLS = {"fit": (), "pretrain": (SCRATCH,)}


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("tool", TOOLS)
def test_fp32_is_exact_against_the_cpu(run, tool):
    expected = run(tool, f"{tool}-cpu", *TOOLS[tool], accelerator="cpu")
    metrics = run(tool, f"{tool}-gpu", *TOOLS[tool])
    assert losses(metrics) == pytest.approx(losses(expected), rel=1e-5)
    assert [row["grad_norm"] for row in metrics] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-4)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("tool", TOOLS)
def test_every_zero_stage_in_bf16(run, tool, zero):
    expected = losses(run(tool, f"{tool}-fp32", *TOOLS[tool]))
    keys = (f"{tool}.parallel.zero={zero}", f"{tool}.precision=bf16")
    metrics = losses(run(tool, f"{tool}-bf16-{zero}", *TOOLS[tool], *keys))
    assert metrics == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_resumed_run_repeats_the_undisturbed_one(run, folder, tool):
    """Equal to rounding: on a GPU, atomics and the order of sums may change the last bits."""
    expected = losses(run(tool, f"{tool}-resumed", *TOOLS[tool]))
    # As if it had been killed after its first checkpoint.
    shutil.rmtree(folder / f"{tool}-resumed" / "checkpoints" / "step_6")
    assert losses(run(tool, f"{tool}-resumed", *TOOLS[tool]))[3:] == pytest.approx(expected[3:], rel=1e-5)


def test_memory_is_as_planned(run, folder):
    keys = ("pretrain.micro_batch_size=8", "large.hidden_size=768", "large.ffn_size=2048", "large.num_layers=12")
    run("pretrain", "memory", SCRATCH, *keys, "data.seq_length=256")
    record = json.loads((folder / "memory/pretrain.json").read_text())
    sets = (SCRATCH, *keys, "data.seq_length=256")
    plan = plan_run(RunConfig.load(folder / "run.toml", sets), 1, 80e9, 3e14)
    planned = plan_layout(plan.pretrain, 3e14).memory_bytes
    assert planned == pytest.approx(max(record["peak_memory_bytes"]), rel=0.15)


def test_the_launcher_gives_each_rank_its_gpu(run):
    ranks = min(num_gpus(), 4)
    expected = losses(run("fit", "one", "fit.global_batch_size=8"))
    assert losses(run("fit", "launched", "fit.global_batch_size=8", ranks=ranks)) == pytest.approx(expected, rel=1e-5)
