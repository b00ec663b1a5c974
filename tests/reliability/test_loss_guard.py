"""Non-finite numbers and loss spikes: the step is skipped or the run stopped; samples are named; nothing is saved."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from tests.reliability import rank_cases
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import BATCH, base, losses_of, settings  # noqa: F401 - base: a fixture


def test_a_diverging_run_saves_no_bad_weights(pools, base, tmp_path):  # noqa: F811
    table = settings(base, optimizer="sgd", lr=1e30, warmup_steps=0, schedule="constant", bad_numbers="skip")
    table["pretrain"] |= {"steps": 14, "save_every": 1}
    result = pools(2).run(pretrain, settings=table, output=str(tmp_path))
    assert (isinstance(result, str) and "NaN or Inf in" in result) or "steps in a row" in result, result
    for path in tmp_path.rglob("mp_rank_*_model_states.pt"):
        module = torch.load(path, weights_only=True)["module"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in module.values() if tensor is not None)


def test_a_loss_spike(pools, base, tmp_path):  # noqa: F811
    table = settings(base, steps=30, spike=1.0001, save_every=0, lr=1e-9)
    result = pools(1).run(pretrain, settings=table, output=str(tmp_path / "a"))
    assert "expected a loss near those before" in result
    table["pretrain"]["bad_numbers"] = "skip"
    assert len(losses_of(pools(1).run(pretrain, settings=table, output=str(tmp_path / "b")))) == 30


LAYOUTS = ({"tp": 2, "precision": "bf16"}, {"pp": 2}, {"zero": 3, "micro_batch_size": 2})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_sample_whose_loss_is_not_finite_is_named(pools, base, tmp_path, layout):  # noqa: F811
    """Its step leaves weights and moments unchanged; the search for it changes no bit of later steps."""
    table, sample = settings(base, bad_numbers="skip", save_every=1, keep_last=9, **layout), 2 * BATCH + 5
    looked, silent = (
        pools(2).run(
            rank_cases.pretrain_with_nan_sample,
            settings=table,
            output=str(tmp_path / str(look)),
            sample=sample,
            look=look,
        )
        for look in (True, False)
    )
    named = f"{sample - 1}, {sample}" if "micro_batch_size" in layout else f"{sample}"
    assert (
        f"step 3: expected a finite loss and finite gradients, found loss nan; losses of training samples "
        f"{named} are not finite; gradients of " in looked["log"]
    )
    assert losses_of(looked) == losses_of(silent) and looked["losses"] == silent["losses"]
    assert math.isfinite(looked["losses"]["end"]) and losses_of(looked)[2] is None
    before, after = (formats.open(tmp_path / "True/checkpoints" / f"step_{step}") for step in (2, 3))
    assert before.has_moments and before.step == after.step == 2
    for key in before.keys():  # noqa: SIM118 - no dict
        assert all(digest.same_bits(before.read(key, kind), after.read(key, kind)) for kind in (WEIGHT, *MOMENTS)), key
    table["pretrain"]["bad_numbers"] = "stop"
    stopped = pools(2).run(
        rank_cases.pretrain_with_nan_sample, settings=table, output=str(tmp_path / "stopped"), sample=sample
    )
    assert isinstance(stopped, str) and f"training samples {named} are not finite;" in stopped
