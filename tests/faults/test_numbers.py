"""Numbers that are not finite, and losses that leap: stopped or skipped, told with their samples, never saved."""

from __future__ import annotations

import torch

from tests.training.pretraining import pretrain
from tests.training.test_pretrain import DIMS, STEPS, base, losses_of, settings  # noqa: F401 - base: a fixture


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
