"""A whole comparison: the source, then each arm's tries and runs, then what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_ligo.common.atomic_files import write_bytes, write_json
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.experiments.compare import arm_cost, comparison_page, results
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan, jobs_folder, run_arm
from megatron_ligo.experiments.compare.arm_validation import check_arms
from megatron_ligo.experiments.compare.comparison_config import ComparisonConfig, select_arms
from megatron_ligo.experiments.compare.run_queue import JobQueue

RESULTS, PAGE, PICTURE = "results.json", "compare.html", "compare.png"
Log = Callable[[str], None]


def run_comparison(
    spec: ComparisonConfig, output: Path, only: Iterable[str] = (), tell: Log = lambda text: None
) -> dict:
    """Runs what is not yet done of the arms named (none: all), and writes OUTPUT/results.json, compare.html and .png
    of all that is. Started again, it goes on where it stopped."""
    arms = select_arms(spec, only)
    jobs = JobQueue(jobs_folder(output), spec.compare.launcher, tell)
    doing = ComparisonPlan(spec, jobs, jobs.run)
    check_arms(spec, arms)
    arm_cost.check_arm_costs(doing, arms)
    if doing.source() is None:
        raise ConfigError(Problem("compare.source_lr", "a small model that can be trained", "a run that diverged"))
    for arm in arms:
        run_arm(doing, arm)
    found = results.collect_results(ComparisonPlan(spec, jobs, jobs.result), spec.arms)
    write_results(found, output)
    return found


def write_results(found: dict, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    image = comparison_page.draw_curves(found)
    write_bytes(output / PICTURE, image)
    write_bytes(output / PAGE, comparison_page.render_page(found, image).encode())
    write_json(output / RESULTS, found)
