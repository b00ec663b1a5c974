"""A fit keeps its best operator, stops early without improvement, and stays within its FLOP budget."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.config.run_config import PretrainSection, RunConfig
from megatron_ligo.growth import operator_file
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator
from megatron_ligo.training.best_operator import BestOperator
from megatron_ligo.training.lr_schedule import learning_rate, schedule_after_growth
from tests.tiny_models import hf_llama
from tests.training.pretrain_runs import fit
from tests.training.test_pretrain import BATCH, DIMS, SEQ, make_pair

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("best")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    hf_llama(DIMS).save_pretrained(folder / "hf")
    return folder


def settings(base: Path, **changes) -> dict:
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "hf")
    table["large"]["num_layers"] = DIMS.num_layers + 1
    table["data"] |= {"train": [str(base / "train")], "valid": [str(base / "valid")], "seq_length": SEQ}
    run = {"steps": 6, "lr": 1e-3, "global_batch_size": BATCH, "micro_batch_size": BATCH, "eval_samples": BATCH}
    table["fit"] |= run | {"save_every": 2, "warmup_steps": 0, "eval_every": 1} | changes
    return table


def read_record(output: Path) -> dict:
    return json.loads((output / "operator/operator.json").read_text())


def test_a_fit_that_only_gets_worse_stops_and_writes_its_start(pools, base, tmp_path):
    table = settings(base, lr=0.3, depth_lr=0.3, patience=2, schedule="constant", clip=0.0, spike=0.0)
    pools(1).run(fit, settings=table, output=str(tmp_path / "fit"))
    record = read_record(tmp_path / "fit")
    assert (record["step"], record["steps_done"]) == (0, 2)
    assert record["losses"]["end"] == record["losses"]["start"] < record["losses"]["last"]
    config = RunConfig.from_dict(table)
    start = build_initial_operator(DIMS, config.large, config.operator)
    operator = OperatorFile(tmp_path / "fit/operator")
    assert all(torch.equal(operator.tensor(name), start.tensor(name)) for name in start.shapes())
    # A finished fit does nothing when it is started again.
    pools(1).run(fit, settings=table, output=str(tmp_path / "fit"))
    assert read_record(tmp_path / "fit")["losses"] == record["losses"]


def test_the_best_evaluation_is_written_at_any_layout(pools, base, tmp_path):
    """The learning rate helps at first and harms later: the operator with the lowest held-out loss is kept."""
    table = settings(base, lr=3e-2, depth_lr=1e-2, schedule="constant", clip=0.0, spike=0.0)
    table["fit"]["parallel"]["tp"] = 2
    pools(2).run(fit, settings=table, output=str(tmp_path / "fit"))
    record = read_record(tmp_path / "fit")
    rows = [json.loads(line) for line in (tmp_path / "fit/metrics.jsonl").read_text().splitlines()]
    eval_losses = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    eval_losses |= {0: record["losses"]["start"], 6: record["losses"]["last"]}
    assert record["losses"]["end"] == min(eval_losses.values()) == eval_losses[record["step"]]
    table["fit"]["keep"] = "last"
    pools(2).run(fit, settings=table, output=str(tmp_path / "last"))
    assert read_record(tmp_path / "last")["step"] == 6
    assert read_record(tmp_path / "last")["losses"]["end"] == pytest.approx(record["losses"]["last"], rel=1e-6)


def test_the_operator_of_another_step_is_not_taken(base, tmp_path):
    config = RunConfig.from_dict(settings(base))
    operator = build_initial_operator(DIMS, config.large, config.operator)
    tensors = [(name, operator.tensor(name)) for name in operator.shapes()]
    operator_file.write_operator(operator, tensors, tmp_path / "best", {"step": 70})
    state = {"losses": {"start": 2.0}, "best": {"step": 50, "loss": 1.0, "worse": 0}}
    best = BestOperator(config.fit, tmp_path / "best", state, save=lambda folder: None)
    with pytest.raises(CheckpointError, match="expected the operator of step 50, found step 70"):
        best.read()
    best.state["step"] = 70
    assert set(best.read().shapes()) == set(operator.shapes())


def test_a_fit_stays_within_its_flop_budget(pools, base, tmp_path):
    pools(1).run(fit, settings=settings(base, steps=1), output=str(tmp_path / "one"))
    one = json.loads((tmp_path / "one/metrics.jsonl").read_text())["flops"]
    pools(1).run(fit, settings=settings(base, max_flops=2.9 * one), output=str(tmp_path / "two"))
    assert read_record(tmp_path / "two")["steps_done"] == 2
    with pytest.raises(RuntimeError, match=r"fit.max_flops: expected at least one step"):
        pools(1).run(fit, settings=settings(base, max_flops=0.9 * one), output=str(tmp_path / "none"))


def test_the_rate_after_growth():
    run = PretrainSection(steps=100, lr=1e-3, min_lr=8e-4, warmup_steps=10)
    grown = schedule_after_growth(run)
    assert (grown.lr, grown.min_lr, grown.warmup_steps) == (5e-4, 5e-4, 10)
    shorter = schedule_after_growth(PretrainSection(steps=100, lr=1e-3, grown_peak=0.8, grown_warmup_steps=2))
    assert learning_rate(shorter, 1) == pytest.approx(8e-4) and learning_rate(shorter, 0) == pytest.approx(4e-4)
