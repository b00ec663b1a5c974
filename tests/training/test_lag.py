"""A fit with a lag starts at the loss at which the given training ended, and refuses training from another start."""

import json
from copy import deepcopy
from pathlib import Path

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.config.run_identity import check_same_run
from megatron_ligo.export import handoff
from megatron_ligo.training.fit import prepare_fit
from tests import layer_norm_models
from tests.tiny_models import hf_llama, llama_config
from tests.training.pretrain_runs import fit, pretrain
from tests.training.test_pretrain import BATCH, SEQ, make_pair

SMALL = llama_config(tied=True, num_layers=2, hidden_size=24, num_heads=8, num_kv_heads=4, ffn_size=28)
LARGE = {"num_layers": 5, "hidden_size": 34, "num_heads": 16, "num_kv_heads": 8, "ffn_size": 44}
LAYOUT = {"tp": 2, "pp": 2}


@pytest.fixture(scope="module")
def trained(pools, tmp_path_factory) -> tuple[dict, Path, float]:
    """Settings, a checkpoint of the start after three steps of pretraining on two ranks, and its loss."""
    base = tmp_path_factory.mktemp("lag")
    for seed, name in enumerate(("train", "valid")):
        make_pair(base / name, seed)
    hf_llama(SMALL).save_pretrained(base / "small")
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "small")
    table["large"] |= LARGE
    table["data"] |= {"train": [str(base / "train")], "valid": [str(base / "valid")], "seq_length": SEQ}
    run = {"global_batch_size": BATCH, "eval_samples": BATCH, "save_every": 0, "warmup_steps": 0}
    table["fit"] |= {**run, "steps": 3, "lr": 1e-3, "keep": "last"}
    table["pretrain"] |= {**run, "steps": 3, "lr": 1e-2, "start": str(base / "start")}
    table["pretrain"]["parallel"]["tp"] = 2
    handoff.grow_from_config(RunConfig.from_dict(table), None, base / "start")
    losses = pools(2).run(pretrain, settings=table, output=str(base / "lag"))["losses"]
    assert abs(losses["end"] - losses["start"]) > 1e-2
    checkpoint = base / "lag/checkpoints/step_3"
    table["fit"]["lag"] = str(checkpoint)
    return table, checkpoint, losses["end"]


def test_a_fit_starts_at_the_loss_after_the_lag_and_hands_off_the_start(pools, trained, tmp_path):
    table, _, end = trained
    table = deepcopy(table)
    table["fit"]["parallel"] |= LAYOUT
    pools(4).run(fit, settings=table, output=str(tmp_path / "fit"))
    record = json.loads((tmp_path / "fit/operator/operator.json").read_text())
    assert record["losses"]["start"] == pytest.approx(end, rel=1e-5)
    assert record["losses"]["end"] < record["losses"]["start"]
    grown = handoff.grow_from_config(RunConfig.from_dict(table), tmp_path / "fit/operator", tmp_path / "grown")
    assert grown["fit"]["lagged"]
    table["pretrain"] |= {"start": str(tmp_path / "grown"), "steps": 0}
    losses = pools(2).run(pretrain, settings=table, output=str(tmp_path / "evaluated"))["losses"]
    # The fit's losses are not those of this start, so the run does not compare them.
    assert set(losses) == {"start"} and abs(losses["start"] - record["losses"]["end"]) > 1e-3


def test_a_training_of_another_start_is_refused(trained, tmp_path):
    table, checkpoint, _ = trained
    prepare_fit(RunConfig.from_dict(table))
    for changes, named in [
        # Another order of the layers changes no tensor outside the layers, and not the first layer.
        ({"depth_init": "stack"}, "of another operator (depth_init)"),
        ({"noise": 0.5}, "of another operator (noise)"),
        ({"seed": 7}, "of another operator (seed)"),
    ]:
        other = deepcopy(table)
        other["operator"] |= changes
        with pytest.raises(ConfigError) as caught:
            prepare_fit(RunConfig.from_dict(other))
        assert f"fit.lag: {checkpoint}: expected a training of this start, found {named}" in str(caught.value)
    other = deepcopy(table)
    hf_llama(SMALL, seed=3).save_pretrained(tmp_path / "other")
    other["small"]["path"] = str(tmp_path / "other")
    with pytest.raises(ConfigError, match="a training of this small model"):
        prepare_fit(RunConfig.from_dict(other))
    other = deepcopy(table)
    other["large"] |= {"num_layers": 6, "ffn_size": 60}
    with pytest.raises(ConfigError) as caught:
        prepare_fit(RunConfig.from_dict(other))
    assert f"fit.lag: {checkpoint}: num_layers: expected 6, found 5" in str(caught.value)
    assert "ffn_size: expected 60, found 44" in str(caught.value)


def test_a_checkpoint_without_an_origin_is_judged_by_its_distance(trained, tmp_path):
    table, checkpoint, _ = trained
    convert(formats.open(checkpoint), tmp_path / "hf", "hf")
    other = deepcopy(table)
    other["fit"]["lag"] = str(tmp_path / "hf")
    prepare_fit(RunConfig.from_dict(other))
    other["operator"] |= {"depth_init": "stack"}
    with pytest.raises(ConfigError, match=r"at most 0\.5 of the weights' norm away from it, found \d\.\d\d"):
        prepare_fit(RunConfig.from_dict(other))


def test_a_setting_newer_than_the_run_has_its_default(tmp_path):
    table = RunConfig().to_dict()
    current = {"fit": table["fit"]}
    saved = {"fit": {key: value for key, value in table["fit"].items() if key != "lag"}}
    check_same_run(saved, current, tmp_path)
    with pytest.raises(ConfigError, match=r"fit\.lag: expected , found there"):
        check_same_run(saved, {"fit": table["fit"] | {"lag": "there"}}, tmp_path)
    with pytest.raises(ConfigError, match=r"fit\.distill: expected 0\.0, found 0\.5"):
        check_same_run(saved, {"fit": table["fit"] | {"distill": 0.5}}, tmp_path)


def test_only_decoders_can_have_a_lag(tmp_path):
    _, folder = layer_norm_models.saved(tmp_path, "bert", "BertForMaskedLM")
    table = [f"small.path={folder}", "operator.depth_init=stack", "data.seq_length=12", "fit.lag=anywhere"]
    with pytest.raises(ConfigError, match=r"fit\.lag: expected a decoder, found bert"):
        prepare_fit(RunConfig.load(None, table))
