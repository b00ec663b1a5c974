"""Pretraining runs with experts: killed and resumed at other layouts, exported, and refused."""

import json
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.hf.format import HfReader
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import ConfigError, LayoutError
from megatron_ligo.config.run_config import ParallelSection, PretrainSection
from megatron_ligo.distributed.parallel_dims import ParallelDims
from megatron_ligo.training.initial_weights import check_layout
from megatron_ligo.training.job_summary import describe_job
from tests.layer_norm_models import model_of
from tests.tiny_models import llama_config
from tests.training import test_pretrain
from tests.training.pretrain_runs import pretrain
from tests.training.test_pretrain import STEPS, losses_of, make_pair

EXPERTS = {"num_experts": 4, "top_k": 2, "renormalises_routing": True}
DIMS = llama_config(
    arch="mixtral", model_type="mixtral", tied=True, num_heads=4, num_kv_heads=2, num_layers=2, **EXPERTS
)
# Of which two, four and three ranks may each have as many.
TWELVE = llama_config(
    arch="mixtral", model_type="mixtral", tied=True, num_layers=2, **EXPERTS | {"num_experts": 12, "top_k": 3}
)
EP2_TP2 = {"ep": 2, "tp": 2, "sequence_parallel": True}
# Each but the last is killed after a step.
CHAINS = {
    "ep": [(2, {"ep": 2, "zero": 2}), (4, {"ep": 4}), (1, {})],
    "ep 3": [(2, {"ep": 2}), (4, {"ep": 4, "zero": 2}), (3, {"ep": 3, "zero": 2})],
    "tp, pp": [(4, {**EP2_TP2, "zero": 3}), (4, {"ep": 2, "pp": 2}), (4, {"ep": 2, "zero": 3}), (1, {})],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    for name, sizes in (("", DIMS), ("twelve/", TWELVE)):
        model_of(sizes).save_pretrained(folder / f"{name}hf")
        convert(HfReader(folder / f"{name}hf"), folder / f"{name}universal", "universal")
    return folder


def settings(base: Path, layout: dict, start: str = "universal") -> dict:
    keys = {"save_every": 1, "keep_last": 9, "router_aux_loss": 0.1, "check_replicas_every": 1}
    return test_pretrain.settings(base, start, **keys, **layout)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name != "ep" else name for name in CHAINS]
)
def test_a_run_is_killed_and_resumed_at_other_layouts(pools, base, tmp_path, name):
    chain, model_config, start, batch = CHAINS[name], DIMS, "universal", {}
    if name == "ep 3":
        model_config, start = TWELVE, "twelve/universal"
        # With the usual eps Adam's first step turns the rounding of a tiny gradient into a whole step.
        batch = {"global_batch_size": 12, "micro_batch_size": 1, "eval_samples": 12, "eps": 1e-4}
    whole = pools(1).run(pretrain, settings=settings(base, batch, start), output=str(tmp_path / "whole"))
    for world, layout in chain[:-1]:
        run = {"settings": settings(base, batch | layout, start), "output": str(tmp_path / "moved")}
        assert pools(world).run(pretrain, **run, die_after=1) == {"killed": 1}
    world, layout = chain[-1]
    moved = pools(world).run(pretrain, settings=settings(base, batch | layout, start), output=str(tmp_path / "moved"))
    assert moved["taken"] == STEPS - len(chain) + 1
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=2e-6)
    checkpoints = [tmp_path / name / "checkpoints" for name in ("whole", "moved")]
    for step in range(1, STEPS + 1):
        right, resumed = (formats.open(folder / f"step_{step}") for folder in checkpoints)
        assert resumed.layout.get("ep", 1) == chain[min(step, len(chain)) - 1][1].get("ep", 1)
        assert resumed.step == right.step == step
        for key in right.keys():  # noqa: SIM118
            for kind in (WEIGHT, *MOMENTS):
                expected = right.read(key, kind).float()
                scale = float(expected.abs().max())
                assert torch.allclose(resumed.read(key, kind).float(), expected, rtol=0, atol=1e-4 * scale), (step, key)
    for row in moved["steps"]:
        loads = [row[f"expert_load_{expert}"] for expert in range(model_config.num_experts)]
        assert sum(loads) == pytest.approx(model_config.num_experts) and row["dropped_tokens"] == 0
        assert 0 < row["router_entropy"] <= 1 and row["expert_load_min"] <= min(loads)
    for name in ("router_entropy", "expert_load_max", "expert_load_2"):
        columns = [[row[name] for row in run["steps"]] for run in (moved, whole)]
        assert columns[0] == pytest.approx(columns[1], rel=1e-3), name


def test_a_checkpoint_of_divided_experts_is_exported(pools, base, tmp_path):
    """transformers' own class has the loss that the run ends with."""
    run = {"settings": settings(base, {"ep": 2, "steps": 1}), "output": str(tmp_path / "run")}
    record = pools(2).run(pretrain, **run)
    convert(formats.open(tmp_path / "run/checkpoints/step_1"), tmp_path / "hf", "hf")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    batch = test_pretrain.data(base).eval_parts(test_pretrain.BATCH, test_pretrain.BATCH, 1, 0)[0][1][0]
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert float(loss) == pytest.approx(record["losses"]["end"], rel=1e-5)
    assert json.loads((tmp_path / "run/pretrain.json").read_text())["layout"] == {
        "tp": 1,
        "pp": 1,
        "dp": 2,
        "ep": 2,
        "zero": 1,
    }


@pytest.mark.parametrize(
    "layout, where",
    [({"ep": 3}, "ep = 3"), ({"tp": 2}, "sequence_parallel"), ({"ep": 8}, "ep = 8")],
    ids=str,
)
def test_what_experts_cannot_have_is_refused(layout, where):
    with pytest.raises(ConfigError) as caught:
        check_layout(DIMS, ParallelSection(**layout), 12)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_a_dense_model_has_no_expert_parallelism():
    with pytest.raises(ConfigError, match="no experts"):
        check_layout(llama_config(), ParallelSection(ep=2), 12)


def test_ranks_that_experts_do_not_divide_are_refused():
    with pytest.raises(LayoutError) as caught:
        ParallelDims.divide(6, tp=1, pp=2, ep=2)
    assert caught.value.problems[0].expected.startswith("a multiple of tp x pp x ep")


def test_the_summary_names_experts_and_their_ranks():
    text = describe_job("scratch", TWELVE, PretrainSection(), ParallelDims(1, 1, 4, ep=2), 0, 64, 1e6)
    assert "TP 1 x PP 1 x DP 4, EP 2, ZeRO 1" in text
    assert f"12 experts of which a token takes {TWELVE.top_k}" in text
