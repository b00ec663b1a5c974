"""Probes of tiny models: ranked by the loss after the lag, within the FLOPs, the refused ones named."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.advise import FINALISTS, advise
from megatron_ligo.training.initial_weights import scratch_model_config
from tests.tiny_models import hf_llama
from tests.training.test_pretrain import DIMS, SEQ, make_pair

BATCH, LAG = 4, 10


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder: Path = tmp_path_factory.mktemp("advise")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    hf_llama(DIMS).save_pretrained(folder / "hf")
    table = RunConfig().to_dict()
    table["small"]["path"] = str(folder / "hf")
    table["large"] |= {"num_layers": 8, "num_heads": 16, "num_kv_heads": 4}
    table["pretrain"] |= {"global_batch_size": BATCH, "micro_batch_size": BATCH, "eval_samples": BATCH}
    table["data"] |= {"train": [str(folder / "train")], "valid": [str(folder / "valid")], "seq_length": SEQ}
    # One process probes whatever the layout of the runs to come is.
    table["pretrain"]["parallel"] |= {"tp": 2, "pp": 2}
    return RunConfig.from_dict(table)


def test_ranked_within_the_budget(config, tmp_path):
    step = train_flops(scratch_model_config(config), BATCH * SEQ, SEQ)
    budget = 6.5 * LAG * step  # scratch and two methods, two rates each
    methods = ["lossless", "stack", "lemon"]  # a pad has no room where heads change their ratio
    with pytest.raises(ConfigError, match="probes of 10 steps"):
        advise(config, tmp_path, budget, (1e-3, 1e-2), methods)
    result = advise(config, tmp_path, 1.4 * budget, (1e-3, 1e-2), methods)
    assert result["flops"] <= 1.4 * budget and result["lag_steps"] >= LAG
    assert set(result["refused"]) == {"lemon"}
    losses = [row["after_lag"] for row in result["ranking"]]
    assert losses == sorted(losses) and {row["method"] for row in result["ranking"]} == {"lossless", "stack"}
    assert all(row["other_seed"] is not None for row in result["ranking"])
    lossless = next(row for row in result["ranking"] if row["method"] == "lossless")
    assert lossless["at_once"] != lossless["after_lag"] and result["scratch"]["after_lag"] is not None
    text = " ".join(result["advice"])
    planned = config.pretrain.steps * BATCH * SEQ / result["parameters"]["large"]
    assert f"method = '{result['ranking'][0]['method']}'" in text
    assert f"plans {planned:.2g} tokens per parameter" in text


@pytest.mark.long
def test_a_fit_is_judged_after_the_lag_too(config, tmp_path):
    """At the same FLOPs as its start, the fit's among them; one that costs more than a probe is named."""
    step = train_flops(scratch_model_config(config), BATCH * SEQ, SEQ)
    probes = 2 + 3 * FINALISTS  # scratch and a method at one rate, and the finalists' further ones
    short = replace(
        config, fit=replace(config.fit, steps=2, global_batch_size=BATCH, micro_batch_size=BATCH, eval_samples=4)
    )
    result = advise(short, tmp_path / "short", 1.01 * probes * LAG * step, (1e-3,), ["stack"], fit=True)
    rows = {row["method"]: row for row in result["ranking"]}
    assert set(rows) == {"stack", "stack.fitted"} and result["lag_steps"] == LAG
    assert all(row["other_seed"] is not None for row in rows.values()) and result["flops"] == probes * LAG * step
    # It is another model after its fit, and has been trained for fewer steps.
    assert rows["stack.fitted"]["at_once"] != rows["stack"]["at_once"]
    job = read_json(tmp_path / "short/jobs/stack.fitted/seed_1/run_1_0.001/job.json")
    assert job["config"]["pretrain"]["steps"] < LAG
    long = replace(short, fit=replace(short.fit, steps=3 * LAG))
    result = advise(long, tmp_path / "long", 1.01 * probes * LAG * step, (1e-3,), ["stack"], fit=True)
    assert [row["method"] for row in result["ranking"]] == ["stack"]
    assert "costs more" in result["refused"]["stack.fitted"]
    # It is known before any of it is run.
    assert not (tmp_path / "long/jobs/stack.fitted").exists()
