"""How a comparison reports missing runs: which, how many and why. The results are made up."""

import pytest

from megatron_ligo.experiments.compare import comparison_page, single_run
from megatron_ligo.experiments.compare.results import collect_results
from tests.experiments.compare.made_up_runs import MadeUpRuns, write_comparison


def collect(tmp_path, lost: dict[str, float | None], *sets: str) -> dict:
    """lost: by part of a run's name, None if it diverged, KeyError if it is not done."""

    def end(name: str) -> float | None:
        for part, loss in lost.items():
            if part in name:
                if loss is KeyError:
                    raise KeyError(name)
                return loss
        return 3.0 if name.startswith("scratch") else 2.5

    spec = write_comparison(tmp_path, *sets)
    return collect_results(MadeUpRuns(tmp_path, end).plan(spec), spec.arms)


def rows(results: dict) -> dict[str, list[str]]:
    return {row[0]: row for row in comparison_page.arm_rows(results)[1:]}


def cautions(results: dict, name: str) -> list[str]:
    return [line for line in results["cautions"] if line.startswith(f"{name}: ")]


def test_a_run_that_diverged_is_counted_and_named(tmp_path):
    lost = {"learned/seed_3/run_0.25": None, "learned/seed_3/run_0.5": None}
    results = collect(tmp_path, lost)
    row = rows(results)["learned"]
    assert [cell.endswith(", 2 of 3 seeds") for cell in row[2:5]] == [True, True, False]
    assert row[5].endswith("runs missing on 1")
    (line,) = cautions(results, "learned")
    assert "diverged with seed 3 at 0.25, 0.5 of scratch's FLOPs" in line
    assert [lost["why"] for lost in results["arms"]["learned"]["missing"]] == ["diverged", "diverged"]
    counts = {
        row[0]: row[5] for row in comparison_page.difference_rows(results)[1:] if row[1:3] == ["learned", "scratch"]
    }
    assert counts == {"0.25": "2 of 3", "0.5": "2 of 3", "1": "3"}


def test_an_unfinished_run_is_not_reported_as_diverged(tmp_path):
    results = collect(tmp_path, {"learned/seed_2": KeyError, "learned/seed_3/run_1_": KeyError})
    (line,) = cautions(results, "learned")
    assert "no run with seed 2 at 0.25, 0.5, 1 and seed 3 at 1 of scratch's FLOPs (not done" in line


def test_an_arm_that_diverged_on_all_seeds_says_so(tmp_path):
    row = rows(collect(tmp_path, {"learned/": None}))["learned"]
    assert row[2:5] == ["diverged"] * 3


def test_diverged_scratch_leaves_fewer_seeds_to_compare(tmp_path):
    results = collect(
        tmp_path, {"scratch/seed_2/run_1_": None, "scratch/seed_3/run_1_": None}, "compare.budgets=[0.25]"
    )
    row = rows(results)
    assert row["learned"][4] == "at least 75%, 1 of 3 seeds compared" and row["scratch"][3] == "3.0000, 1 of 3 seeds"
    assert "diverged with seeds 2, 3 at 1 of" in cautions(results, "scratch")[0]
    assert any("only for the seeds on which scratch" in line for line in results["cautions"])


def test_diverged_tuning_is_the_reason_for_missing_runs(tmp_path):
    results = collect(tmp_path, {"learned/seed_0/try": None}, "compare.lrs=[1e-3, 2e-3]")
    (line,) = cautions(results, "learned")
    assert "seeds 1, 2, 3 at 0.25, 0.5, 1" in line and "every tuning run diverged" in line


def test_an_arm_that_lost_seeds_is_not_the_lowest(tmp_path):
    lost = {"stack/seed_1": None, "stack/seed_2": None, "stack/seed_3": 2.0}
    results = collect(tmp_path, lost, 'arms.stack.operator.method="stack"', 'arms.other.operator.method="lossless"')
    against = {each["against"] for each in results["differences"] if each["arm"] == "other"}
    assert against == {"scratch", "learned.start"}


def test_complete_runs_need_no_caution(tmp_path):
    results = collect(tmp_path, {})
    assert not cautions(results, "learned") and not any("seeds" in cell for cell in rows(results)["learned"])


def test_a_fit_selected_on_the_results_text_is_reported(tmp_path):
    def helped(*sets: str) -> list[str]:
        return [line for line in collect(tmp_path, {}, *sets)["cautions"] if "Evaluations cost no FLOPs" in line]

    (line,) = helped('arms.learned.fit.keep="best"', 'compare.tune_valid=["other"]')
    assert line.startswith("learned: ") and "data.valid" in line and "tune_valid" in line
    assert helped("arms.learned.fit.patience=2", "arms.learned.fit.eval_every=1") and not helped()
    # Without evaluations between, patience ends nothing.
    assert not helped("arms.learned.fit.patience=2")


def test_the_page_states_the_held_out_tokens(tmp_path):
    assert "5 held-out samples (60 tokens)" in comparison_page.describe_comparison(
        collect(tmp_path, {}, "pretrain.eval_samples=5")
    )


def test_whole_runs_are_drawn_with_the_fit_before_them(tmp_path):
    rows = [{"step": step, "loss": 5.0 - step / 100, "flops": 10.0 * step} for step in range(1, 401)]
    curve = single_run.thin_curve(rows)
    assert len(curve) == 200 and curve[-1][0] == 4000.0 and curve[-1][1] == pytest.approx(rows[-1]["loss"], abs=0.2)
    assert single_run.thin_curve([]) == []
    results = collect(tmp_path, {})
    empty = comparison_page.draw_whole_runs(results)
    for run in results["arms"]["learned"]["runs"]:
        run["curve"] = [(run["spent"] + flops, loss) for flops, loss in curve]
    drawn = comparison_page.draw_whole_runs(results)
    assert drawn.startswith(b"\x89PNG") and drawn != empty
    page = comparison_page.render_page(results, empty, drawn)
    assert page.count("data:image/png;base64,") == 2 and "$" not in page


def test_a_fit_is_priced_by_plain_training_from_its_start(tmp_path):
    """The start falls from 4.0 to 3.9 in ten steps and to 3.5 in twenty; the fit ends at 3.7."""
    spec = write_comparison(tmp_path)

    class Evaluated(MadeUpRuns):
        cost, reached = 0, 3.7

        def get_result(self, job):
            result = super().get_result(job)
            if job.kind == "fit":
                return {**result, "flops": self.cost * self.step_flops}
            if job.name.startswith("learned.start/"):
                return {**result, "evaluations": [(10 * self.step_flops, 3.9), (20 * self.step_flops, 3.5)]}
            if job.name.startswith("learned/"):
                return {**result, "losses": {**result["losses"], "start": self.reached}}
            return result

    cases = ((16, 3.7, 15, False), (14, 3.7, 15, True), (6, 3.95, 5, False), (14, 3.4, None, None))
    for cost, reached, steps, pays in cases:
        made_up = Evaluated(tmp_path, lambda name: 2.5)
        made_up.cost, made_up.reached = cost, reached
        plan = made_up.plan(spec)
        (price,) = collect_results(plan, spec.arms)["fits"]
        assert (price["arm"], price["start"], price["seeds"]) == ("learned", "learned.start", 3)
        assert price["fit_flops"] == pytest.approx(cost * plan.step_flops) and price["pays"] is pays
        assert price["plain_flops"] == (pytest.approx(steps * plan.step_flops) if steps else None)
    results = collect_results(plan, spec.arms)
    assert comparison_page.fit_rows(results)[1][3:] == ["not within its runs", "it pays"]
    assert comparison_page.trend_rows(results)[1][:2] == ["learned", "learned.start"]


def test_the_number_of_intervals_is_reported(tmp_path):
    """Six pairs at three budgets, and six of one seed, which have no interval."""
    (note,) = [line for line in collect(tmp_path, {})["cautions"] if "leave zero out" in line]
    assert note.startswith("18 differences have a 95% interval each") and "about 0.9 of them" in note
    one_seed = collect(tmp_path, {}, "compare.seeds=[1]")
    assert not any("leave zero out" in line for line in one_seed["cautions"])
