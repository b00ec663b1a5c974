"""Runs a whole comparison: the source model, then each arm's tuning and runs, then the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_ligo.common.atomic_files import write_bytes, write_json
from megatron_ligo.common.errors import ConfigError, Problem
from megatron_ligo.common.folder_kinds import COMPARISON, check_output
from megatron_ligo.experiments.compare import arm_cost, comparison_page, results
from megatron_ligo.experiments.compare.arm_plan import ComparisonPlan, jobs_folder, run_arm
from megatron_ligo.experiments.compare.arm_validation import check_arms, check_shared
from megatron_ligo.experiments.compare.comparison_config import Arm, ComparisonConfig, select_arms
from megatron_ligo.experiments.compare.run_queue import JobQueue

RESULTS, PAGE, PICTURE = "results.json", "compare.html", "compare.png"
LogLine = Callable[[str], None]


def run_comparison(
    spec: ComparisonConfig,
    output: Path,
    only: Iterable[str] = (),
    log_line: LogLine = lambda text: None,
    accept_changed: bool = False,
) -> dict:
    """Runs the unfinished jobs of the selected arms (default: all). An interrupted comparison resumes.

    Writes OUTPUT/results.json, compare.html and compare.png from every finished job. accept_changed: as in `JobQueue`.
    """
    check_output(output, COMPARISON)
    arms = select_arms(spec, only)
    jobs = JobQueue(jobs_folder(output), spec.compare.launcher, log_line, accept_changed)
    plan = ComparisonPlan(spec, jobs, jobs.run)
    check_arms(spec, arms)
    arm_cost.check_arm_costs(plan, arms)
    check_shared(spec.config)
    sources = [plan.source(), *(plan.source(arm, seed) for arm in arms for seed in spec.compare.seeds)]
    if None in sources:
        raise ConfigError(Problem("compare.source_lr", "a rate at which the small model trains", "a run that diverged"))
    for arm in share_arms(arms, jobs):
        run_arm(plan, arm)
    record = results.collect_results(ComparisonPlan(spec, jobs, jobs.result), spec.arms)
    write_results(record, output)
    return record


def share_arms(arms: Iterable[Arm], jobs: JobQueue) -> Iterator[Arm]:
    """Yields every arm, those that no other command is running first: commands that share a folder divide the arms."""
    remaining = list(arms)
    while remaining:
        arm = next((arm for arm in remaining if not jobs.is_busy(arm.folder)), remaining[0])
        remaining.remove(arm)
        yield arm


def write_results(record: dict, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    image, whole = comparison_page.draw_curves(record), comparison_page.draw_whole_runs(record)
    write_bytes(output / PICTURE, image)
    write_bytes(output / PAGE, comparison_page.render_page(record, image, whole).encode())
    write_json(output / RESULTS, record)
