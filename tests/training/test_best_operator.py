"""A fit keeps the best that it came to, ends when it gets no better, and costs no more than it may."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ligo.config.run_config import PretrainSection, RunConfig
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import build_initial_operator
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


def record(output: Path) -> dict:
    return json.loads((output / "operator/operator.json").read_text())


def test_a_fit_that_only_harms_leaves_where_it_began_and_ends(pools, base, tmp_path):
    table = settings(base, lr=0.3, depth_lr=0.3, patience=2, schedule="constant", clip=0.0, spike=0.0)
    pools(1).run(fit, settings=table, output=str(tmp_path / "fit"))
    told = record(tmp_path / "fit")
    assert (told["step"], told["steps_done"]) == (0, 2)
    assert told["losses"]["end"] == told["losses"]["start"] < told["losses"]["last"]
    config = RunConfig.from_dict(table)
    start = build_initial_operator(DIMS, config.large, config.operator)
    found = OperatorFile(tmp_path / "fit/operator")
    assert all(torch.equal(found.tensor(name), start.tensor(name)) for name in start.shapes())
    # Started again, it is done.
    pools(1).run(fit, settings=table, output=str(tmp_path / "fit"))
    assert record(tmp_path / "fit")["losses"] == told["losses"]


def test_the_best_of_the_way_is_written_at_any_layout(pools, base, tmp_path):
    """A rate that is good first and bad later: what is kept is the operator of the lowest evaluation."""
    table = settings(base, lr=3e-2, depth_lr=1e-2, schedule="constant", clip=0.0, spike=0.0)
    table["fit"]["parallel"]["tp"] = 2
    pools(2).run(fit, settings=table, output=str(tmp_path / "fit"))
    told = record(tmp_path / "fit")
    rows = [json.loads(line) for line in (tmp_path / "fit/metrics.jsonl").read_text().splitlines()]
    ways = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    ways |= {0: told["losses"]["start"], 6: told["losses"]["last"]}
    assert told["losses"]["end"] == min(ways.values()) == ways[told["step"]]
    table["fit"]["keep"] = "last"
    pools(2).run(fit, settings=table, output=str(tmp_path / "last"))
    assert record(tmp_path / "last")["step"] == 6
    assert record(tmp_path / "last")["losses"]["end"] == pytest.approx(told["losses"]["last"], rel=1e-6)


def test_no_more_flops_than_allowed(pools, base, tmp_path):
    pools(1).run(fit, settings=settings(base, steps=1), output=str(tmp_path / "one"))
    one = json.loads((tmp_path / "one/metrics.jsonl").read_text())["flops"]
    pools(1).run(fit, settings=settings(base, max_flops=2.9 * one), output=str(tmp_path / "two"))
    assert record(tmp_path / "two")["steps_done"] == 2
    with pytest.raises(RuntimeError, match=r"fit.max_flops: expected at least one step"):
        pools(1).run(fit, settings=settings(base, max_flops=0.9 * one), output=str(tmp_path / "none"))


def test_the_rate_after_growth():
    run = PretrainSection(steps=100, lr=1e-3, min_lr=8e-4, warmup_steps=10)
    grown = schedule_after_growth(run)
    assert (grown.lr, grown.min_lr, grown.warmup_steps) == (5e-4, 5e-4, 10)
    shorter = schedule_after_growth(PretrainSection(steps=100, lr=1e-3, grown_peak=0.8, grown_warmup_steps=2))
    assert learning_rate(shorter, 1) == pytest.approx(8e-4) and learning_rate(shorter, 0) == pytest.approx(4e-4)
