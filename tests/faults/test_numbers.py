"""Numbers that are not finite, and losses that leap: stopped or skipped, told with their samples, never saved."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ligo.config import Config
from megatron_ligo.training.data import open_data
from tests.faults import cases
from tests.tiny import hf_llama, llama_dims
from tests.training.pretraining import pretrain
from tests.training.test_pretrain import DIMS, STEPS, base, losses_of, settings  # noqa: F401 - base: a fixture

SIZE = 2  # sequences a step: so few that some token comes in one step alone


def rare(table: dict, folder: Path) -> tuple[int, int]:
    """(a token, the only step in which it is read)."""
    section = Config.from_dict(table).data
    data = open_data(section, section.seq_length, STEPS * SIZE, 0, section.seed, folder)
    steps: dict[int, set[int]] = {}
    for step in range(STEPS):
        (batch,) = data.batch(step, SIZE, SIZE, 1, 0)
        for token in np.unique(batch["tokens"].numpy()):
            steps.setdefault(int(token), set()).add(step)
    return next((token, *found) for token, found in sorted(steps.items()) if len(found) == 1 and 1 <= min(found) <= 4)


@pytest.fixture(scope="module")
def poisoned(base, tmp_path_factory) -> tuple[dict, int]:  # noqa: F811
    """Settings of a run that meets one token whose embedding is too large to be squared; the step in which."""
    folder = tmp_path_factory.mktemp("poisoned")
    table = settings(base, str(folder / "hf"), global_batch_size=SIZE, eval_samples=2)
    table["data"]["valid"] = []
    token, step = rare(table, folder / "cache")
    model = hf_llama(llama_dims(**{**vars(DIMS), "tied": False}))
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = 1e30
    model.save_pretrained(folder / "hf")
    return table, step


LAYOUTS = [(2, {}), (2, {"zero": 3}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {"precision": "bf16"})]


@pytest.mark.parametrize("world, layout", LAYOUTS, ids=str)
def test_a_bad_step_is_skipped_or_stops_the_run(pools, poisoned, tmp_path, world, layout):
    table, step = poisoned
    table["pretrain"] |= {key: value for key, value in layout.items() if key == "precision"} or {"precision": "fp32"}
    parallel = {key: value for key, value in layout.items() if key != "precision"}
    table["pretrain"]["parallel"] = Config().to_dict()["pretrain"]["parallel"] | parallel
    table["pretrain"]["bad_numbers"] = "stop"
    found = pools(world).run(pretrain, settings=table, output=str(tmp_path / "run"))
    assert isinstance(found, str), found
    assert f"step {step + 1}: expected a finite loss and finite gradients" in found
    assert "gradients of" in found and "embed" in found
    saved = [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")]
    assert all(int(name.removeprefix("step_")) <= step for name in saved)
    # The same run, told to skip, goes on from there and past it.
    table["pretrain"]["bad_numbers"] = "skip"
    record = pools(world).run(cases.logged, settings=table, output=str(tmp_path / "run"))
    assert f"step {step + 1}: expected a finite loss" in record["log"]
    rows = record["steps"]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if row["grad_norm"] is None] == [step + 1]
    state = json.loads((tmp_path / "run/checkpoints" / f"step_{STEPS}" / "record.json").read_text())["state"]
    assert state["skipped"] == [step + 1]


def test_a_run_that_diverges_saves_nothing_of_it(pools, base, tmp_path):  # noqa: F811
    table = settings(base, optimizer="sgd", lr=1e30, warmup_steps=0, schedule="constant", bad_numbers="skip")
    table["pretrain"] |= {"steps": 14, "save_every": 1}
    found = pools(2).run(pretrain, settings=table, output=str(tmp_path))
    assert (isinstance(found, str) and "NaN or Inf in" in found) or "steps in a row" in found, found
    for path in tmp_path.rglob("mp_rank_*_model_states.pt"):
        module = torch.load(path, weights_only=True)["module"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in module.values() if tensor is not None)


def test_a_loss_that_leaps(pools, base, tmp_path):  # noqa: F811
    table = settings(base, steps=30, spike=1.0001, save_every=0, lr=1e-9)
    found = pools(1).run(pretrain, settings=table, output=str(tmp_path / "a"))
    assert "expected a loss like those before" in found
    table["pretrain"]["bad_numbers"] = "skip"
    assert len(losses_of(pools(1).run(pretrain, settings=table, output=str(tmp_path / "b")))) == 30
