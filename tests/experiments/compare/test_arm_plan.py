"""The jobs of each arm, with made-up results: the steps of a control, and what a budget pays for."""

import pytest

from megatron_ligo.common.errors import ConfigError
from megatron_ligo.experiments.compare.arm_plan import run_arm
from tests.experiments.compare.made_up_runs import MadeUpRuns, write_comparison

EARLY = {"losses": {"end": 3.0}, "step": 1, "flops": 1.0}


def full_control(tmp_path, *sets: str, fit: dict | None = EARLY) -> tuple[dict, dict]:
    """The control's runs, and its jobs by their name."""
    spec = write_comparison(tmp_path, *sets)
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0, lambda name: fit)
    arm = next(arm for arm in spec.arms if arm.full)
    return run_arm(made_up.plan(spec), arm), made_up.jobs


def test_a_control_trains_on_what_a_fit_that_ended_early_has_read(tmp_path):
    for early in ("arms.learned.fit.max_flops=1e6", "arms.learned.fit.patience=1"):
        outcome, jobs = full_control(tmp_path, early)
        assert jobs["learned.full/seed_1/full_0.001"].config.pretrain.steps == 1
        assert jobs["learned.full/seed_1/run_1_0.001"].config.pretrain.first_sample == 4
        assert len(outcome["runs"]) == 9


def test_a_control_beside_a_fit_with_a_lag_has_the_fit_of_its_own_rate(tmp_path):
    _, jobs = full_control(tmp_path, "arms.learned.fit.patience=1", "arms.learned.lag=3")
    assert jobs["learned.full/seed_2/full_0.001"].config.pretrain.steps == 1 and "learned/seed_2/fit_0.001" in jobs


def test_made_upafter_a_lag_read_what_neither_it_nor_the_fit_could(tmp_path):
    """The lag is trained before the fit is, and cannot know how soon that ends."""
    spec = write_comparison(tmp_path, "arms.learned.fit.patience=1", "arms.learned.fit.steps=4", "arms.learned.lag=3")
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0, lambda name: EARLY)
    run_arm(made_up.plan(spec), next(arm for arm in spec.arms if arm.fitted))
    lag, run = (made_up.jobs[f"learned/seed_1/{name}_0.001"].config.pretrain for name in ("lag", "run_1"))
    assert (lag.first_sample, lag.steps, run.first_sample) == (16, 3, 28)
    assert made_up.jobs["learned/seed_1/fit_0.001"].config.fit.lag.endswith("lag_0.001/run/checkpoints/step_1")


def test_a_control_of_a_fit_that_cannot_end_early_asks_for_none(tmp_path):
    _, jobs = full_control(tmp_path)
    assert jobs["learned.full/seed_1/full_0.001"].config.pretrain.steps == 2
    assert jobs["learned.full/seed_1/run_1_0.001"].config.pretrain.first_sample == 8
    assert not any(job.kind == "fit" for job in jobs.values())


CODES = ["arms.coded={operator = {method = 'corner'}, codes = true}", "arms.blank={scratch = true, codes = true}"]


def test_the_cost_of_codes_counts_for_growth_and_for_scratch(tmp_path):
    spec = write_comparison(tmp_path, *CODES)
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0)
    plan = made_up.plan(spec)
    for name in ("coded", "blank"):
        arm = next(arm for arm in spec.arms if arm.name == name)
        runs, jobs = run_arm(plan, arm)["runs"], made_up.jobs
        assert len(runs) == 9 and {run.spent for run in runs} == {7.0 * plan.step_flops}
        assert jobs[f"{name}/seed_2/run_1_0.001"].config.pretrain.steps == 93
    folder = str(tmp_path / "{}/seed_1/codes/run")
    assert jobs["coded/seed_1/grown"].config.operator.codes == folder.format("coded")
    assert jobs["blank/seed_1/run_1_0.001"].config.pretrain.codes == folder.format("blank")
    assert not jobs["coded/seed_1/run_1_0.001"].config.pretrain.codes


def test_rates_are_added_while_the_best_is_at_an_edge(tmp_path):
    best = 8e-3
    end = lambda name: abs(float(name.rpartition("_")[2]) - best)  # noqa: E731
    sets = ("compare.lrs=[1e-3, 2e-3]", "compare.tune_budget=0.25")
    for more, tried in ((0, 2), (2, 4), (5, 5)):
        spec = write_comparison(tmp_path, *sets, f"compare.extend_lrs={more}")
        made_up = MadeUpRuns(tmp_path / f"{more}", end)
        tries = made_up.plan(spec).tune(spec.arms[0])
        assert len(tries) == tried and max(tries) == 2e-3 * 2 ** (tried - 2)


def test_a_control_waits_for_a_fit_that_may_end_early(tmp_path):
    for left in (None, {**EARLY, "losses": {}}):
        outcome, jobs = full_control(tmp_path, "arms.learned.fit.patience=1", fit=left)
        assert not outcome["runs"] and not any("full_" in name for name in jobs)


TRUNK = ("pretrain.schedule=wsd", "compare.decay=0.2", "compare.warmup=0.1")


def test_the_runs_of_all_budgets_branch_off_one_trunk(tmp_path):
    spec = write_comparison(tmp_path, *TRUNK)
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0)
    plan = made_up.plan(spec)
    assert [run.steps for run in run_arm(plan, spec.arms[0])["runs"]] == [25, 50, 100] * 3
    jobs = {name.removeprefix("scratch/seed_2/"): job for name, job in made_up.jobs.items() if "seed_2" in name}
    shown = {
        name: (job.config.pretrain.steps, job.config.pretrain.decay_steps, job.continues.rpartition("/")[2], job.keep)
        for name, job in jobs.items()
    }
    assert shown == {
        "trunk_0.25_0.001": (20, 0, "", True),
        "trunk_0.5_0.001": (40, 0, "trunk_0.25_0.001", True),
        "trunk_1_0.001": (80, 0, "trunk_0.5_0.001", True),
        "run_0.25_0.001": (25, 5, "trunk_0.25_0.001", False),
        "run_0.5_0.001": (50, 10, "trunk_0.5_0.001", False),
        "run_1_0.001": (100, 20, "trunk_1_0.001", False),
    }
    # Two or three steps of warm-up: a tenth of the shortest run.
    assert {job.config.pretrain.warmup_steps for job in jobs.values()} == {2}


def test_a_trunk_that_diverges_has_no_branches(tmp_path):
    spec = write_comparison(tmp_path, *TRUNK)
    made_up = MadeUpRuns(tmp_path, lambda name: None if "trunk_0.5" in name else 2.0)
    runs = run_arm(made_up.plan(spec), spec.arms[0])["runs"]
    assert [run.loss for run in runs] == [2.0, None, None] * 3
    assert not any("run_0.5" in name or "run_1_" in name for name in made_up.jobs)


def test_the_small_model_trains_on_for_as_many_flops(tmp_path):
    spec = write_comparison(tmp_path, "arms.small={small=true}", "compare.source_steps=3")
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0)
    plan = made_up.plan(spec)
    arm = next(arm for arm in spec.arms if arm.name == "small")
    for run in run_arm(plan, arm)["runs"]:
        assert abs(run.flops - run.budget * plan.unit) <= 0.5 * plan.small_step_flops and run.spent == 0
    section = made_up.jobs["small/seed_1/run_1_0.001"].config
    assert section.pretrain.steps > 200 and section.large.num_layers is None
    assert section.pretrain.start.endswith("source/run/checkpoints/step_1")
    assert not any(job.kind == "grow" for job in made_up.jobs.values())


def test_the_rate_of_a_fit_is_tuned_by_the_end_of_its_runs(tmp_path):
    """The best of 1e-4 and 1e-3 is at the edge, so 2e-3 is tried; each has its own fit and its own pretraining rate."""
    losses = {"fit_0.0001": 3.0, "fit_0.001": 2.5, "fit_0.002": 2.6}
    rates = ["compare.fit_lrs=[1e-4, 1e-3]", "compare.lrs=[1e-3, 2e-3]", "compare.extend_lrs=1"]
    spec = write_comparison(tmp_path, *rates)
    better = {"fit_0.001/seed_0/try_0.25_0.002": 2.4}
    made_up = MadeUpRuns(tmp_path, lambda name: better.get(name.partition("/")[2], losses[name.split("/")[1]]))
    outcome = run_arm(made_up.plan(spec), next(arm for arm in spec.arms if arm.fitted))
    assert {rate: run.loss for rate, run in outcome["fit_tries"].items()} == {1e-4: 3.0, 1e-3: 2.4, 2e-3: 2.6}
    assert (outcome["fit_lr"], outcome["lr"], len(outcome["runs"])) == (1e-3, 2e-3, 9)
    for rate in (1e-4, 1e-3, 2e-3):
        assert made_up.jobs[f"learned/fit_{rate:g}/seed_0/fit"].config.fit.lr == rate
    assert "learned/fit_0.001/seed_3/run_1_0.002" in made_up.jobs and "learned/seed_1/fit" not in made_up.jobs


@pytest.mark.parametrize("key", ["fit.patience=1", "arms.learned.fit.max_flops=1e6"])
def test_the_rate_of_a_fit_whose_length_depends_on_it_is_not_tuned(tmp_path, key):
    with pytest.raises(ConfigError, match="fit_lrs"):
        write_comparison(tmp_path, "compare.fit_lrs=[1e-4, 1e-3]", key)


SOURCES = ["compare.source_steps=10", "compare.source_seeds=[0, 5]", "arms.late={operator={}, source_steps=30}"]


def test_seeds_grow_several_sources_and_arms_grow_them_at_their_own_time(tmp_path):
    spec = write_comparison(tmp_path, *SOURCES)
    made_up = MadeUpRuns(tmp_path, lambda name: 2.0)
    plan = made_up.plan(spec)
    for arm in spec.arms:
        run_arm(plan, arm)
    grown = {name: job.config.small.path for name, job in made_up.jobs.items() if job.kind == "grow"}
    folders = {name: path.split("/run/")[0].rpartition("/")[2] for name, path in grown.items()}
    early = {1: "source", 2: "source_seed_5", 3: "source"}
    assert {folders[f"learned/seed_{seed}/grown"] for seed in (1, 3)} == {"source"}
    for seed, source in early.items():
        assert folders[f"learned.start/seed_{seed}/grown"] == source
        assert folders[f"late/seed_{seed}/grown"] == source.replace("source", "source_30")
    trained = {name: job.config.pretrain for name, job in made_up.jobs.items() if name.startswith("source")}
    assert {name: (run.steps, run.seed) for name, run in trained.items()} == {
        "source": (10, 0), "source_seed_5": (10, 5), "source_30": (30, 0), "source_30_seed_5": (30, 5),
    }  # fmt: skip
    assert [source["steps"] for source in plan.sources()] == [10, 10, 30, 30]


def test_a_time_of_growth_needs_a_small_model_that_is_trained_here(tmp_path):
    with pytest.raises(ConfigError, match="source_steps"):
        write_comparison(tmp_path, "arms.late={operator={}, source_steps=30}")


def test_a_fit_of_which_no_rate_ends_has_no_runs(tmp_path):
    """Neither at its own rate, which was not asked for."""
    spec = write_comparison(tmp_path, "compare.fit_lrs=[1e-4, 1e-2]")
    made_up = MadeUpRuns(tmp_path, lambda name: None if "/try_" in name else 2.0)
    outcome = run_arm(made_up.plan(spec), next(arm for arm in spec.arms if arm.fitted))
    assert (outcome["fit_lr"], outcome["lr"], outcome["runs"]) == (None, None, [])
    assert not any("/run_" in name for name in made_up.jobs)
