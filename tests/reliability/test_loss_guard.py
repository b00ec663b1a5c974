"""Non-finite numbers and loss spikes: the step is skipped or the run stopped; samples are named; nothing is saved."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.io import digest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from tests.reliability import rank_cases
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import BATCH, DIMS, base, losses_of, settings  # noqa: F401 - base: a fixture


def test_a_diverging_run_saves_no_bad_weights(pools, base, tmp_path):  # noqa: F811
    table = settings(base, optimizer="sgd", lr=1e30, warmup_steps=0, schedule="constant", bad_numbers="skip")
    table["pretrain"] |= {"steps": 14, "save_every": 1}
    result = pools(2).run(pretrain, settings=table, output=str(tmp_path))
    assert (isinstance(result, str) and "NaN or Inf in" in result) or "steps in a row" in result, result
    for path in tmp_path.rglob("mp_rank_*_model_states.pt"):
        module = torch.load(path, weights_only=True)["module"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in module.values() if tensor is not None)


@pytest.fixture(scope="module")
def learnable(base, tmp_path_factory) -> Path:  # noqa: F811
    """Like `base`, with texts that a model learns within some steps: each token follows from the one before."""
    folder = tmp_path_factory.mktemp("learnable")
    for seed, name in enumerate(("train", "valid")):
        random = np.random.default_rng(seed)
        builder = IndexedDatasetBuilder(f"{folder / name}.bin", dtype=np.uint16)
        for _ in range(80):
            builder.add_document((random.integers(DIMS.vocab_size) + 7 * np.arange(40)) % DIMS.vocab_size, [40])
        builder.finalize(f"{folder / name}.idx")
    shutil.copytree(base / "hf", folder / "hf")
    return folder


def learning(learnable: Path, **changes) -> dict:
    run = {"steps": 40, "schedule": "constant", "lr": 1e-2, "save_every": 1, "keep_last": 99, "micro_batch_size": 4}
    return settings(learnable, "hf", **(run | changes))


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", [{"zero": 3}, {"tp": 2, "precision": "bf16"}], ids=str)
def test_a_spike_is_skipped(pools, learnable, tmp_path, layout):
    """Weights and moments stay; the anomaly is in the log, in metrics.jsonl and in TensorBoard's events."""
    table = learning(learnable, bad_numbers="skip", **layout)
    result = pools(2).run(rank_cases.pretrain_with_wrong_labels, settings=table, output=str(tmp_path), steps=[30, 33])
    assert isinstance(result, dict), result
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if row.get("skipped")] == [31, 34]
    assert "expected loss at most" in rows[30]["anomaly"] and rows[30]["anomaly"] in result["log"]
    assert rows[30]["loss"] > 2 * rows[29]["loss"] > 2 * rows[39]["loss"]
    assert all(0 < row["update_ratio"] < 1 for row in rows)
    before, after = (formats.open(tmp_path / "checkpoints" / f"step_{step}") for step in (30, 31))
    for key in before.keys():  # noqa: SIM118 - no dict
        assert all(digest.same_bits(before.read(key, kind), after.read(key, kind)) for kind in (WEIGHT, *MOMENTS)), key
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Tensors("anomaly/text_summary")] == [31, 34]


def test_a_stopped_run_asks_before_it_resumes(pools, learnable, tmp_path):
    """Also after a kill, and from a checkpoint without the guard's memory: it is in metrics.jsonl."""
    case = {"settings": learning(learnable, save_every=5, keep_last=2), "output": str(tmp_path), "steps": [30]}
    run = lambda **options: pools(1).run(rank_cases.pretrain_with_wrong_labels, **case, **options)  # noqa: E731
    assert run(die_after=28)["killed"] == 28
    record = json.loads((tmp_path / "checkpoints/step_25/record.json").read_text())
    assert len(record["state"].pop("guard")["detector"]["losses"]) == 25
    (tmp_path / "checkpoints/step_25/record.json").write_text(json.dumps(record))
    stopped = run()
    assert stopped.startswith("NumbersError: step 31: expected loss at most"), stopped
    assert (
        rows_of(tmp_path)[-1]["step"] == 31
        and stopped.split(" (")[0].removeprefix("NumbersError: ") in (rows_of(tmp_path)[-1]["anomaly"])
    )
    for _ in range(2):
        again = run()
        assert "has stopped: step 31: expected loss at most" in again and "--resume-after-anomaly" in again
    passed = run(resume=True)
    assert "accepted by --resume-after-anomaly" in passed["log"]
    assert passed["losses"]["end"] < 2.0 and "skipped" not in rows_of(tmp_path)[30]
    assert [stop["accepted"] for stop in json.loads((tmp_path / "anomalies.json").read_text())["stops"]] == [True]


@pytest.mark.parametrize("lr, message", [(3.0, "step 1: expected update at most 3"), (2.0, "step 2: expected ")])
def test_a_divergence_is_stopped_before_the_update_that_follows(pools, base, tmp_path, lr, message):  # noqa: F811
    result = pools(1).run(pretrain, settings=settings(base, lr=lr), output=str(tmp_path))
    assert result.startswith(f"NumbersError: {message}"), result
    assert not (tmp_path / "checkpoints").exists()


def test_the_checkpoint_before_an_anomaly_is_kept(pools, learnable, tmp_path):
    table = learning(learnable, bad_numbers="warn", save_every=2, keep_last=2, steps=48)
    result = pools(1).run(
        rank_cases.pretrain_with_wrong_labels, settings=table, output=str(tmp_path), steps=list(range(31, 48))
    )
    assert isinstance(result, dict), result
    assert result["log"].count("expected loss at most") == 1
    steps = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [30, 46, 48]
    # The level of held-out losses is that of the start: this run has measured no other.
    state = json.loads((tmp_path / "checkpoints/step_46/record.json").read_text())["state"]
    assert state["guard"]["detector"]["held_out"] == state["losses"]["start"]


def test_steps_are_skipped_a_bounded_number_of_times(pools, learnable, tmp_path):
    table = learning(learnable, bad_numbers="skip", save_every=0, steps=48)
    result = pools(1).run(
        rank_cases.pretrain_with_wrong_labels, settings=table, output=str(tmp_path), steps=list(range(31, 48))
    )
    assert "10 steps in a row were refused" in result
    assert len([row for row in rows_of(tmp_path) if row.get("skipped")]) == 10


LAYOUTS = ({"tp": 2, "precision": "bf16"}, {"pp": 2}, {"zero": 3, "micro_batch_size": 2})


@pytest.mark.parametrize(
    "layout", [LAYOUTS[0], *(pytest.param(each, marks=pytest.mark.long) for each in LAYOUTS[1:])], ids=str
)
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
