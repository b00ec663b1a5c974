"""The last loss of a fit is the first loss of pretraining at every pair of layouts: ragged sizes, tied embeddings."""

import json
from pathlib import Path

import pytest

from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.export import handoff, provenance
from tests.tiny_models import hf_llama, llama_config
from tests.training.pretrain_runs import fit, pretrain
from tests.training.test_pretrain import make_pair

SMALL = llama_config(tied=True, num_layers=2, hidden_size=24, num_heads=8, num_kv_heads=4, ffn_size=28)
LARGE = {"num_layers": 5, "hidden_size": 34, "num_heads": 16, "num_kv_heads": 8, "ffn_size": 44}
TP2_PP2 = {"tp": 2, "pp": 2}
LAYOUTS = [(1, {}), (2, {"pp": 2}), (4, {"tp": 4}), (4, {"tp": 2, "zero": 3}), (4, {"pp": 4}), (4, {"zero": 2})]


@pytest.fixture(scope="module")
def grown(pools, tmp_path_factory) -> tuple[dict, Path]:
    return fit_and_grow(pools, tmp_path_factory.mktemp("journey"), noise=0.5)


def fit_and_grow(pools, base: Path, sizes: dict = LARGE, layout: dict = TP2_PP2, **operator) -> tuple[dict, Path]:
    """Returns a run's settings, and the hand-off of a model fitted by four ranks."""
    base.mkdir(exist_ok=True)
    for seed, name in enumerate(("train", "valid")):
        make_pair(base / name, seed)
    hf_llama(SMALL).save_pretrained(base / "small")
    table = RunConfig().to_dict()
    table["small"]["path"] = str(base / "small")
    table["large"] |= sizes
    table["data"] |= {"train": [str(base / "train")], "valid": [str(base / "valid")], "seq_length": 12}
    table["operator"] |= operator
    # 7 samples divide over none of the layouts with data parallelism.
    table["fit"] |= {"steps": 4, "lr": 1e-2, "save_every": 0, "eval_samples": 7}
    table["fit"]["parallel"] |= layout
    table["pretrain"] |= {"start": str(base / "grown"), "steps": 0}
    pools(4).run(fit, settings=table, output=str(base / "fit"))
    handoff.grow_from_config(RunConfig.from_dict(table), base / "fit" / "operator", base / "grown")
    return table, base / "grown"


@pytest.mark.parametrize("world, layout", LAYOUTS, ids=str)
def test_the_first_loss_is_the_last_of_the_fit(pools, grown, tmp_path, world, layout):
    check_first_loss(pools, grown, tmp_path, world, layout)


def test_the_first_loss_is_the_last_of_a_fit_from_the_corner(pools, tmp_path):
    """Random numbers in the residual stream are drawn alike by the fit, the growth and any layout."""
    corner = fit_and_grow(pools, tmp_path / "fitted", method="corner")
    check_first_loss(pools, corner, tmp_path / "run", 2, {"pp": 2})


def test_the_first_loss_is_the_last_of_a_fit_of_experts(pools, tmp_path):
    experts = {**LARGE, "num_experts": 4, "top_k": 2}
    grown = fit_and_grow(pools, tmp_path / "fitted", experts, {"ep": 2}, noise=0.5)
    check_first_loss(pools, grown, tmp_path / "run", 2, {"ep": 2})
    row = json.loads((tmp_path / "fitted/fit/metrics.jsonl").read_text().splitlines()[-1])
    loads = [row[f"expert_load_{expert}"] for expert in range(4)]
    assert sum(loads) == pytest.approx(4) and row["dropped_tokens"] == 0


def check_first_loss(pools, grown: tuple[dict, Path], tmp_path: Path, world: int, layout: dict) -> None:
    table, folder = grown
    table["pretrain"]["parallel"] = {**RunConfig().to_dict()["pretrain"]["parallel"], **layout}
    losses = pools(world).run(pretrain, settings=table, output=str(tmp_path))["losses"]
    fitted = provenance.read(folder)["fit"]["losses"]
    assert losses["fit"] == fitted["end"]
    assert losses["start_on_fit_batch"] == pytest.approx(fitted["end"], rel=1e-5)
    # The fit must have changed the loss for this to mean anything.
    assert abs(fitted["end"] - fitted["start"]) > 1e-2
