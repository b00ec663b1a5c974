"""Runs that resume at another layout at each restart: the numbers are those of the undisturbed run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from tests.reliability import rank_cases
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import STEPS, base, losses_of, settings  # noqa: F401 - base: a fixture

# (ranks, layout) of each start; all but the last are killed in their second step.
CHAINS = {
    "fp32": [
        (2, {"tp": 2, "zero": 2}),
        (4, {"tp": 2, "pp": 2}),
        (2, {"cp": 2, "zero": 2}),
        (2, {"zero": 3, "micro_batch_size": 2}),
        (2, {"pp": 2}),
    ],
    "bf16": [(1, {}), (2, {"zero": 3}), (2, {"tp": 2})],
}
TOLERANCE = {"fp32": 2e-6, "bf16": 3e-3}


def run_chain(run, layouts: list, of, output: Path) -> dict:
    """Runs one step at each layout, and the rest at the last."""
    for world, layout in layouts[:-1]:
        killed = run(world, settings=of(layout), output=str(output), die_after=1)
        assert killed == {"killed": 1}
    world, layout = layouts[-1]
    return run(world, settings=of(layout), output=str(output))


@pytest.mark.parametrize("precision", CHAINS)
def test_a_pretraining_resumes_at_any_layout(pools, base, tmp_path, precision):  # noqa: F811
    def of(layout: dict) -> dict:
        return settings(base, precision=precision, save_every=1, **layout)

    def run(world: int, **arguments) -> dict:
        return pools(world).run(pretrain, **arguments)

    layouts = CHAINS[precision]
    whole = run(1, settings=of({}), output=str(tmp_path / "whole"))
    moved = run_chain(run, layouts, of, tmp_path / "moved")
    assert moved["taken"] == STEPS - len(layouts) + 1
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=TOLERANCE[precision])
    assert moved["losses"]["end"] == pytest.approx(whole["losses"]["end"], rel=TOLERANCE[precision])


@pytest.mark.parametrize("rank", [0, 3])
def test_a_fit_resumes_at_any_layout(pools, base, tmp_path, rank):  # noqa: F811
    """With full-rank maps (one per layer for the ffn) or low-rank maps."""

    def of(layout: dict) -> dict:
        return fit_settings(base, rank, layout)

    def run(world: int, **arguments) -> dict:
        return pools(world).run(rank_cases.run_fit, **arguments)

    layouts = CHAINS["fp32"] if not rank else CHAINS["fp32"][:2]
    whole = run(1, settings=of({}), output=str(tmp_path / "whole"))
    moved = run_chain(run, layouts, of, tmp_path / "moved")
    assert moved["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    expected, result = (load_file(tmp_path / name / "operator/operator.safetensors") for name in ("whole", "moved"))
    for name, tensor in expected.items():
        # Adam's first steps are signs: where a gradient is about zero, rounding decides.
        assert torch.allclose(result[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max())), name


@pytest.mark.long
def test_a_fit_of_experts_resumes_at_any_layout(pools, base, tmp_path):  # noqa: F811
    """Pairs of experts hold the small ffn."""
    sizes = {"num_experts": 4, "top_k": 2, "ffn_size": 16}
    divided = {"ep": 2, "tp": 2, "sequence_parallel": True}
    layouts = [(2, {"ep": 2, "zero": 2}), (4, divided), (2, {"zero": 3, "micro_batch_size": 2}), (1, {})]

    def of(layout: dict) -> dict:
        table = fit_settings(base, 0, layout)
        table["large"] |= sizes
        return table

    def run(world: int, **arguments) -> dict:
        return pools(world).run(rank_cases.run_fit, **arguments)

    whole = run(1, settings=of({}), output=str(tmp_path / "whole"))
    moved = run_chain(run, layouts, of, tmp_path / "moved")
    assert moved["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    expected, result = (load_file(tmp_path / name / "operator/operator.safetensors") for name in ("whole", "moved"))
    assert "routers.1" in expected
    for name, tensor in expected.items():
        assert torch.allclose(result[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max())), name


def fit_settings(base: Path, rank: int, layout: dict) -> dict:  # noqa: F811
    table = settings(base, "hf")
    table["small"]["path"] = str(base / "hf")
    table["large"] |= {"num_layers": 6, "hidden_size": 48, "ffn_size": 100, "num_heads": 16, "num_kv_heads": 8}
    table["operator"] |= {"share": {"default": "all", "ffn": "layer"}, "noise": 0.1, "rank": rank}
    fit = table["fit"]
    fit |= {"steps": STEPS, "lr": 1e-3, "depth_lr": 1e-3, "warmup_steps": 2, "save_every": 1}
    for key, value in layout.items():
        (fit["parallel"] if key in fit["parallel"] else fit)[key] = value
    return table


@pytest.fixture(scope="module")
def whole(pools, base, tmp_path_factory) -> dict:  # noqa: F811
    """The record of an undisturbed pretraining."""
    return pools(1).run(pretrain, settings=settings(base), output=str(tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize("precision", CHAINS)
def test_masters_and_moments_move_bit_for_bit(pools, base, tmp_path, precision):  # noqa: F811
    """Compares the loaded state itself: bf16 losses would not show a lost moment at once."""

    def of(**layout: int) -> dict:
        return settings(base, precision=precision, save_every=1, **layout)

    output = tmp_path / "run"
    assert pools(2).run(pretrain, settings=of(tp=2), output=str(output), die_after=2) == {"killed": 2}
    before = formats.open(output / "checkpoints/step_2")
    for lost in ("", MOMENTS[0]):
        to = tmp_path / f"without_{lost}"
        pools(2).run(rank_cases.resume_and_save, settings=of(zero=3), output=str(output), to=str(to), lost=lost)
        after = formats.open(to / "step_2")
        differ = {
            kind
            for key in before.keys()  # noqa: SIM118 - no dict
            for kind in (WEIGHT, *MOMENTS)
            if not torch.equal(before.read(key, kind), after.read(key, kind))
        }
        assert after.step == before.step == 2 and differ == ({lost} if lost else set())


def test_the_previous_checkpoint_may_have_another_layout(pools, base, whole, tmp_path):  # noqa: F811
    """The newest checkpoint, of two ranks, is damaged: the one before, of one rank, is loaded."""
    pools(1).run(pretrain, settings=settings(base), output=str(tmp_path / "run"), die_after=3)
    pools(2).run(pretrain, settings=settings(base, tp=2), output=str(tmp_path / "run"), die_after=3)
    record = tmp_path / "run/checkpoints/step_4/record.json"
    assert json.loads(record.read_text())["layout"] == {"tp": 2, "pp": 1, "dp": 1, "zero": 1}
    record.write_text("{")
    moved = pools(2).run(pretrain, settings=settings(base, zero=3), output=str(tmp_path / "run"))
    assert moved["taken"] == STEPS - 2
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=TOLERANCE["fp32"])
