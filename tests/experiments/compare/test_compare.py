"""A whole comparison of tiny models: equal FLOPs, controls, done once, refused if another is there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from megatron_ligo.arch.flops import train_flops
from megatron_ligo.common.errors import ConfigError
from megatron_ligo.config.run_config import ParallelSection, RunConfig
from megatron_ligo.experiments.compare import comparison, comparison_config
from megatron_ligo.experiments.compare.comparison_config import CompareSection
from megatron_ligo.experiments.compare.run_queue import ComparisonJob, JobQueue
from megatron_ligo.testing.forked_ranks import free_port
from tests.training.test_pretrain import make_pair

SEQ, BATCH, STEPS = 12, 4, 12
FILE = """
[small]
path = "{folder}/small.json"
[large]
num_layers = 4
hidden_size = 32
[fit]
steps = 2
eval_samples = 4
global_batch_size = 4
[pretrain]
global_batch_size = 4
eval_samples = 4
save_every = 0
[data]
train = ["{folder}/train"]
valid = ["{folder}/valid"]
seq_length = 12
[compare]
seeds = [1]
scratch_steps = 12
budgets = [0.5, 1.0]
lrs = [1e-3]
source_steps = 3
source_valid = ["{folder}/train"]
[arms.learned]
operator = {{method = "noisy_stack"}}
fit = {{lr = 1e-3}}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    sizes = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 2, "vocab_size": 37}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, architectures=["LlamaForCausalLM"])
    config.to_json_file(folder / "small.json", use_diff=False)
    (folder / "compare.toml").write_text(FILE.format(folder=folder))
    return folder


@pytest.fixture(scope="module")
def results(base) -> dict:
    return comparison.run_comparison(comparison_config.load_comparison(base / "compare.toml"), base / "out")


def test_every_arm_costs_the_same(results):
    unit = results["unit_flops"]
    step = unit / STEPS
    assert set(results["arms"]) == {"scratch", "learned", "learned.start", "learned.full"}
    for name, arm in results["arms"].items():
        assert {each["budget"] for each in arm["runs"]} == {0.5, 1.0}, name
        for each in arm["runs"]:
            assert abs(each["flops"] - each["budget"] * unit) <= 0.5 * step, name
            assert (each["spent"] > 0) == (name in ("learned", "learned.full"))
            assert each["loss"] < 4 and each["begun"] < 4
    assert results["arms"]["learned.full"]["runs"][0]["spent"] == pytest.approx(2 * step)


def test_each_run_has_a_loss_on_the_sources_own_text_too(results):
    runs = [each for arm in results["arms"].values() for each in arm["runs"]]
    assert all(1e-4 < abs(each["source_loss"] - each["loss"]) < 1 for each in runs)


def test_flops_equal_those_the_runs_count(base, results):
    for place in ("scratch/seed_1/run_1_0.001", "learned/seed_1/fit", "learned/seed_1/run_1_0.001"):
        row = json.loads((base / "out/jobs" / place / "run/metrics.jsonl").read_text().splitlines()[-1])
        assert json.loads((base / "out/jobs" / place / "result.json").read_text())["flops"] == row["flops"]
    learned = results["arms"]["learned"]["runs"][-1]
    assert learned["flops"] == pytest.approx(learned["spent"] + row["flops"])
    assert results["small"]["flops"] > 0 and results["unit_flops"] > 2 * results["small"]["flops"]


def test_a_fitted_arm_starts_at_its_fits_final_loss(base, results):
    fit = json.loads((base / "out/jobs/learned/seed_1/fit/result.json").read_text())
    assert results["arms"]["learned"]["runs"][0]["begun"] == pytest.approx(fit["losses"]["end"], rel=1e-5)
    job = json.loads((base / "out/jobs/learned/seed_1/run_1_0.001/job.json").read_text())
    assert job["config"]["pretrain"]["first_sample"] == 2 * BATCH and job["config"]["data"]["seed"] == 1
    source = json.loads((base / "out/jobs/source/job.json").read_text())
    assert source["config"]["pretrain"]["seed"] == CompareSection().source_seeds[0]
    assert source["config"]["large"]["num_layers"] is None


def test_a_launcher_gives_a_run_many_ranks(base):
    """The same job under `deepspeed` on two ranks ends with the loss of one process."""
    config = comparison_config.load_comparison(base / "compare.toml").config
    short = replace(config.pretrain, steps=2, start="scratch")
    cut = replace(short, parallel=ParallelSection(tp=2))
    launcher = f"deepspeed --num_gpus 2 --master_port {free_port()} --module"
    result = [
        JobQueue(base / name, how, print).run(ComparisonJob("scratch", "pretrain", replace(config, pretrain=section)))
        for name, how, section in (("one", "", short), ("many", launcher, cut))
    ]
    assert result[1]["losses"] == pytest.approx(result[0]["losses"], rel=1e-5)
    assert result[1]["flops"] == result[0]["flops"] > 0


def test_branches_of_a_trunk_end_as_whole_runs(base, results, tmp_path):
    """Real runs of two budgets, one trunk; the small model trains on beside them."""
    source = base / "out/jobs/source/run/checkpoints/step_3"
    sets = ["pretrain.schedule=wsd", "compare.decay=0.25", "arms.small={small=true}", f"small.path={source}"]
    sets.append("compare.source_steps=0")
    spec = comparison_config.load_comparison(base / "compare.toml", sets)
    record = comparison.run_comparison(spec, tmp_path / "out", only=["scratch", "small"])
    jobs = tmp_path / "out/jobs/scratch/seed_1"
    config = RunConfig.from_dict(json.loads((jobs / "run_1_0.001/job.json").read_text())["config"], "job")
    assert (config.pretrain.steps, config.pretrain.decay_steps) == (STEPS, 3)
    whole = JobQueue(tmp_path / "whole", "", print).run(ComparisonJob("whole", "pretrain", config))
    branch = json.loads((jobs / "run_1_0.001/result.json").read_text())
    assert branch["losses"] == whole["losses"] and branch["curve"] == whole["curve"]
    # The mean over the held-out samples, one by one, is the loss at the end.
    assert len(branch["sample_losses"]) == 4
    assert sum(branch["sample_losses"]) / 4 == pytest.approx(branch["losses"]["end"], abs=2e-5)
    small = record["arms"]["small"]["runs"]
    assert [run["loss"] < run["begun"] for run in small] == [True, True]
    assert not (jobs / "run_1_0.001/run/checkpoints").exists() and (jobs / "trunk_1_0.001/run/checkpoints").exists()


def test_jobs_run_once_and_other_settings_are_refused(base, results):
    logged = []
    again = comparison.run_comparison(
        comparison_config.load_comparison(base / "compare.toml"), base / "out", log_line=logged.append
    )
    assert logged == [] and again == results
    # A job file of a version without fit.lag.
    path = base / "out/jobs/learned/seed_1/fit/job.json"
    job = json.loads(path.read_text())
    assert job["config"]["fit"].pop("lag") == ""
    path.write_text(json.dumps(job))
    assert (
        comparison.run_comparison(
            comparison_config.load_comparison(base / "compare.toml"), base / "out", log_line=logged.append
        )
        == results
        and logged == []
    )
    other = comparison_config.load_comparison(base / "compare.toml", ["pretrain.weight_decay=0.3"])
    with pytest.raises(ConfigError) as caught:
        comparison.run_comparison(other, base / "out")
    (problem,) = caught.value.problems
    assert problem.where.startswith(str(base / "out/jobs")) and "job.json" in problem.found


def test_an_arm_with_a_lag_pays_for_it_and_shares_its_controls(base, results):
    arm = 'arms.after={operator={method="noisy_stack"}, fit={lr=1e-3}, lag=3}'
    result = comparison.run_comparison(
        comparison_config.load_comparison(base / "compare.toml", [arm]), base / "out", only=["after"]
    )
    step = result["unit_flops"] / STEPS
    fit = json.loads((base / "out/jobs/after/seed_1/fit_0.001/result.json").read_text())
    runs = result["arms"]["after"]["runs"]
    assert runs[0]["spent"] == pytest.approx(fit["flops"] + 3 * step)
    assert fit["flops"] > result["arms"]["learned"]["runs"][0]["spent"]
    assert all(abs(each["flops"] - each["budget"] * result["unit_flops"]) <= 0.5 * step for each in runs)
    job = json.loads((base / "out/jobs/after/seed_1/run_1_0.001/job.json").read_text())
    assert job["config"]["pretrain"]["first_sample"] == (2 + 3) * BATCH
    assert set(result["arms"]) == {*results["arms"], "after"}
    against = {each["against"] for each in result["differences"] if each["arm"] == "after"}
    assert against == {"learned.start", "learned.full", "scratch"}


def test_the_page_says_what_it_cannot_know(base, results):
    text = (base / "out/compare.html").read_text()
    for caution in ("1 seed(s)", "A small experiment", "none is tuned", "the same small model"):
        assert caution in text
    assert all(each["verdict"] == "one seed: no verdict" for each in results["differences"])
    pairs = {(each["arm"], each["against"]) for each in results["differences"]}
    assert {("learned", "learned.start"), ("learned", "learned.full"), ("learned", "scratch")} <= pairs


def test_all_faults_of_a_file_are_reported_together(base):
    wrong = ["compare.tune_seed=1", "compare.lrs=[1e-3, 1e-3]", "arms.scratch.x=1", "arms.a.lag=0", "fit.lag=there"]
    wrong.append("arms.b.fit.lag=there")
    with pytest.raises(ConfigError) as caught:
        comparison_config.load_comparison(base / "compare.toml", wrong)
    places = sorted(problem.where for problem in caught.value.problems)
    lags = ["arms.a.lag", "arms.b.fit.lag", "fit.lag"]
    assert places == sorted([*lags, "arms.scratch", "arms.scratch", "compare.lrs", "compare.tune_seed"])


def test_invalid_arms_are_refused_before_any_runs(base, tmp_path):
    wrong = ["arms.a={operator={method='loss'}}", "arms.b={operator={method='aki'}, fit={}}", "large.vocab_size=64"]
    wrong.append("arms.c={operator={method='stack'}, fit={distill=0.5}}")
    with pytest.raises(ConfigError) as caught:
        comparison.run_comparison(comparison_config.load_comparison(base / "compare.toml", wrong), tmp_path)
    problems = {problem.where: problem.found for problem in caught.value.problems}
    assert sorted(problems) == ["arms.a", "arms.b", "arms.c"]
    assert "operator.borrow: " in problems["arms.b"] and "fit.distill: " in problems["arms.c"]
    assert not list(tmp_path.iterdir())


def test_an_arm_is_a_table_with_a_name_for_a_folder(base, tmp_path):
    wrong = '[arms]\na = {fit = true}\nb = {operator = "lossless"}\n"" = {operator = {}}\n"../x" = {operator = {}}\n'
    (tmp_path / "wrong.toml").write_text(FILE.format(folder=base).split("[arms")[0] + wrong)
    with pytest.raises(ConfigError) as caught:
        comparison_config.load_comparison(tmp_path / "wrong.toml", ["compare.budgets=[0.5, 0.50000001]"])
    places = sorted(problem.where for problem in caught.value.problems)
    assert places == ["arms.", "arms.../x", "arms.a", "arms.b", "compare.budgets"]


def test_a_step_s_flops_are_the_large_model_s(base, results):
    from megatron_ligo.arch.model_config import ModelConfig

    large = ModelConfig.from_json(results["large"])
    assert results["unit_flops"] == STEPS * train_flops(large, BATCH * SEQ, SEQ)
