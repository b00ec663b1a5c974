"""Collects the results of a comparison as plain data, for results.json and the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import prod
from statistics import mean

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.manifest import library_versions
from megatron_ligo.experiments.compare.arm_plan import ArmRun, ComparisonPlan, planned_runs, run_arm
from megatron_ligo.experiments.compare.comparison_config import (
    SCRATCH,
    Arm,
    CompareSection,
    full_training_control,
    unfitted_control,
)
from megatron_ligo.experiments.compare.savings import crossing, difference, saving, trend

FEW_SEEDS, FEW_STEPS, SMALL_MODEL, FEW_SAMPLES = 3, 1000, 10**8, 256
DIVERGED, NO_RUN = "diverged", "no run"


def collect_results(plan: ComparisonPlan, arms: Iterable[Arm]) -> dict:
    """Collects the results of all jobs finished so far."""
    spec, source = plan.spec, plan.source()
    outcomes = {arm.name: run_arm(plan, arm) for arm in arms}
    scratch = {run.seed: (run.flops, run.loss) for run in outcomes[SCRATCH]["runs"] if _ended_at(run, 1.0)}
    samples = spec.config.pretrain.eval_samples
    differences = _differences(plan, {name: arm["runs"] for name, arm in outcomes.items()})
    missing = {arm.name: _missing(spec.compare, arm, outcomes[arm.name]["runs"]) for arm in arms}
    table, expected = {}, (len(spec.compare.seeds), len(spec.compare.budgets))
    for arm in arms:
        runs = outcomes[arm.name]["runs"]
        points, grown_from = _points(runs), plan.source(arm)
        cost = grown_from["flops"] if grown_from else None
        saved = {"source_free": saving(points, scratch, 0.0, *expected).summary}
        counted = saving(points, scratch, cost or 0.0, *expected).summary if arm.grown else saved["source_free"]
        saved["source_counted"] = (
            counted if cost is not None or not arm.grown else "unknown: the source's cost is unknown"
        )
        table[arm.name] = {
            "grown": arm.grown,
            "fit": arm.fitted,
            "full": arm.full,
            "source_steps": arm.source_steps,
            "lr": outcomes[arm.name]["lr"],
            "fit_lr": outcomes[arm.name]["fit_lr"],
            "fit_tries": {f"{lr:g}": run.loss for lr, run in outcomes[arm.name]["fit_tries"].items()},
            "tries": {f"{lr:g}": run.loss for lr, run in outcomes[arm.name]["tries"].items()},
            "runs": [_run_record(run) for run in runs],
            "missing": missing[arm.name],
            "saved": saved,
        }
    return {
        "settings": spec.to_dict(),
        "small": source and {key: source[key] for key in ("flops", "loss")},
        "sources": [{key: each[key] for key in ("steps", "seed", "flops", "loss")} for each in plan.sources()],
        "parameters": {"large": count_parameters(plan.large)},
        "large": plan.large.to_json(),
        "unit_flops": plan.unit,
        "step_flops": plan.step_flops,
        "held_out": {"samples": samples, "tokens": samples * plan.large.tokens_per_sample(spec.config.data.seq_length)},
        "arms": table,
        "trends": _trends(differences),
        "differences": differences,
        "fits": _fit_prices(plan, {name: arm["runs"] for name, arm in outcomes.items()}),
        "cautions": [*cautions(plan, outcomes, missing), *_multiplicity_note(differences)],
        "versions": library_versions(),
    }


def count_parameters(model_config: ModelConfig) -> int:
    arch = architectures.get(model_config.arch)
    return sum(prod(arch.param(key).shape(model_config)) for key in arch.keys(model_config))


def _run_record(run: ArmRun) -> dict:
    record = asdict(run)
    del record["sample_losses"]  # in each job's result.json
    return record


def _ended_at(run: ArmRun, budget: float) -> bool:
    return run.budget == budget and run.loss is not None


def _missing(compare: CompareSection, arm: Arm, runs: Iterable[ArmRun]) -> list[dict]:
    """Lists every planned run without a loss: it diverged, or does not exist."""
    losses = {(run.seed, run.budget): run.loss for run in runs}
    lost = [key for key in planned_runs(compare, arm) if losses.get(key) is None]
    return [{"seed": key[0], "budget": key[1], "why": DIVERGED if key in losses else NO_RUN} for key in lost]


def _points(runs: Iterable[ArmRun]) -> dict[int, list[tuple[float, float]]]:
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        if run.loss is not None:
            points.setdefault(run.seed, []).append((run.flops, run.loss))
    return points


def _differences(plan: ComparisonPlan, runs: dict[str, list[ArmRun]]) -> list[dict]:
    """Pairs each fitted arm with its controls, and each grown arm with scratch and the best unfitted arm."""
    pairs = []
    arms = plan.spec.arms
    for arm in arms:
        if arm.fitted:
            pairs += [
                (arm.name, control.name) for control in (unfitted_control(arm, arms), full_training_control(arm, arms))
            ]
        if arm.grown:
            pairs.append((arm.name, SCRATCH))
    differences = []
    for budget in sorted(plan.spec.compare.budgets):
        ended = {name: [run for run in arm_runs if _ended_at(run, budget)] for name, arm_runs in runs.items()}
        losses = {name: {run.seed: run.loss for run in arm_runs} for name, arm_runs in ended.items()}
        samples = {name: {run.seed: run.sample_losses for run in arm_runs} for name, arm_runs in ended.items()}
        best = _best_unfitted(arms, losses)
        more = [(arm.name, best) for arm in arms if arm.grown and best not in (None, arm.name)]
        for name, other in dict.fromkeys([*pairs, *more]):
            gap = difference(*(table.get(arm, {}) for table in (losses, samples) for arm in (name, other)))
            if gap:
                differences.append({"budget": budget, "arm": name, "against": other, **asdict(gap)})
    return differences


def _fit_prices(plan: ComparisonPlan, runs: dict[str, list[ArmRun]]) -> list[dict]:
    """Returns, for each fit, its FLOPs and those after which its start, trained plainly, has the same held-out loss.

    Means over the seeds of the largest budget at which both ran. plain_flops is interpolated between evaluations
    (pretrain.eval_every), and None if a seed never has that loss. A fit with a lag lowers another loss: left out.
    """
    prices, arms = [], plan.spec.arms
    for arm in arms:
        control = unfitted_control(arm, arms) if arm.fitted and not arm.lag else None
        pairs = _pairs_at_largest_budget(runs[arm.name], runs[control.name]) if control else []
        if not pairs:
            continue
        reached = [
            crossing(
                [(0.0, plain.begun), *((at - plain.spent, loss) for at, loss in plain.evaluations)], fitted.begun, True
            )
            for fitted, plain in pairs
        ]
        cost = mean(fitted.spent - plain.spent for fitted, plain in pairs)
        never = any(each.flops is None for each in reached)
        plain_flops = None if never else mean(each.flops for each in reached)
        pays = None if never else cost < plain_flops
        row = {"arm": arm.name, "start": control.name, "seeds": len(pairs), "loss": mean(run.begun for run, _ in pairs)}
        prices.append({**row, "fit_flops": cost, "plain_flops": plain_flops, "pays": pays})
    return prices


def _pairs_at_largest_budget(ours: list[ArmRun], theirs: list[ArmRun]) -> list[tuple[ArmRun, ArmRun]]:
    by_key = {(run.budget, run.seed): run for run in theirs if run.begun is not None}
    pairs = [(run, by_key[run.budget, run.seed]) for run in ours if (run.budget, run.seed) in by_key]
    pairs = [(run, other) for run, other in pairs if run.begun is not None]
    return [pair for pair in pairs if pair[0].budget == max(run.budget for run, _ in pairs)]


def _trends(differences: Iterable[dict]) -> list[dict]:
    """Returns, for each pair of arms, how much their mean difference changes with each doubling of the budget."""
    by_pair: dict[tuple[str, str], dict[float, float]] = {}
    for row in differences:
        by_pair.setdefault((row["arm"], row["against"]), {})[row["budget"]] = row["mean"]
    return [
        {"arm": arm, "against": against, "per_doubling": change}
        for (arm, against), means in by_pair.items()
        if (change := trend(means)) is not None
    ]


def _best_unfitted(arms: Iterable[Arm], losses: dict[str, dict[int, float]]) -> str | None:
    starts = (arm for arm in arms if arm.grown and not (arm.fitted or arm.full or arm.small))
    names = [arm.name for arm in starts if losses.get(arm.name)]
    # Seeds differ by more than arms do: an arm with more seeds takes precedence.
    return min(names, key=lambda name: (-len(losses[name]), sum(losses[name].values())), default=None)


def cautions(plan: ComparisonPlan, outcomes: dict[str, dict], missing: dict[str, list[dict]]) -> list[str]:
    """Returns what a reader must know before trusting a figure."""
    compare, config = plan.spec.compare, plan.spec.config
    lines = []
    if len(compare.seeds) < FEW_SEEDS:
        lines.append(f"{len(compare.seeds)} seed(s): differences between arms may be chance.")
    if compare.scratch_steps < FEW_STEPS or count_parameters(plan.large) < SMALL_MODEL:
        tokens = compare.scratch_steps * config.pretrain.global_batch_size
        tokens *= plan.large.tokens_per_sample(config.data.seq_length)
        size = f"{count_parameters(plan.large) / 1e6:.3g}M parameters and {tokens / 1e6:.3g}M tokens"
        lines.append(f"A small experiment ({size} for scratch): it says nothing about much larger models or budgets.")
    if config.pretrain.eval_samples < FEW_SAMPLES:
        few = f"{config.pretrain.eval_samples} held-out samples"
        lines.append(f"{few}: another choice of text may turn the sign of a difference (take {FEW_SAMPLES} or more).")
    if any(not run.sample_losses for arm in outcomes.values() for run in arm["runs"] if run.loss is not None):
        lines.append("Losses by held-out sample are missing: the intervals leave out the chance in the choice of text.")
    if len(compare.lrs) == 1:
        lines.append(f"One learning rate, {compare.lrs[0]:g}, for all arms: none is tuned, and it may favour one.")
    elif not compare.tune_valid:
        lines.append("Learning rates were tuned on the held-out text of the results (tune_valid is empty).")
    lines += _selection_notes(plan.spec.arms)
    for name, arm in outcomes.items():
        lines += _edge_notes(f"{name}: its", sorted(arm["tries"]) or compare.lrs, arm["lr"])
        lines += _edge_notes(f"{name}: its fit's", sorted(arm["fit_tries"]), arm["fit_lr"])
        lines += _missing_runs_notes(name, missing[name], arm["tries"])
    if any(lost["budget"] == 1.0 for lost in missing[SCRATCH]):
        lines.append("Savings are given only for the seeds on which scratch finished.")
    source, whole = plan.source(), [run.loss for run in outcomes[SCRATCH]["runs"] if _ended_at(run, 1.0)]
    if source and source["loss"] is not None and whole and source["loss"] <= max(whole):
        ended = f"The small model itself ended at {source['loss']:.4f}, not above scratch ({max(whole):.4f})"
        lines.append(f"{ended}: the savings are as much its own as those of growth.")
    if len(compare.source_seeds) == 1 or not compare.source_steps:
        lines.append("All seeds grow the same small model: another one is in no interval.")
    lines.append(
        "Each arm's figures include its fit; none include tuning, which is the "
        "same for all. With many arms and few seeds, the lowest arm is partly the luckiest."
    )
    return lines


def _edge_notes(whose: str, rates: Sequence[float], best: float | None) -> list[str]:
    if len(rates) < 2 or best not in (min(rates), max(rates)):
        return []
    edge = "lowest" if best == min(rates) else "highest"
    return [f"{whose} best rate is the {edge} tried, {best:g}: a better one may lie beyond."]


def _multiplicity_note(differences: Iterable[dict]) -> list[str]:
    """Says what chance alone does to so many intervals; nothing for a single one."""
    count = sum(row["low"] is not None for row in differences)
    if count < 2:
        return []
    return [
        f"{count} differences have a 95% interval each, none wider for their number: if no arm differed from another, "
        f"chance would leave zero out of about {count / 20:.2g} of them."
    ]


def _selection_notes(arms: Iterable[Arm]) -> list[str]:
    """Names the arms whose fit was selected on the text of the results."""
    fits = {arm.name: arm.config.fit for arm in arms if arm.fitted}
    names = [
        name for name, fit in fits.items() if fit.keep == "best" or (fit.patience and 0 < fit.eval_every < fit.steps)
    ]
    if not names:
        return []
    return [
        f"{', '.join(names)}: held-out losses on data.valid, the text of the results, select the fit's operator or "
        "its end (fit.keep, fit.patience), whatever tune_valid is. Evaluations cost no FLOPs here."
    ]


def _missing_runs_notes(name: str, missing: Iterable[dict], tries: dict[float, ArmRun]) -> list[str]:
    diverged = _describe_seeds(lost for lost in missing if lost["why"] == DIVERGED)
    absent = _describe_seeds(lost for lost in missing if lost["why"] == NO_RUN)
    why = "not done, or its preparation diverged or costs as much"
    if tries and all(tried.loss is None for tried in tries.values()):
        why = "every tuning run diverged"
    lines = []
    if diverged:
        lines.append(f"{name}: diverged with {diverged} of scratch's FLOPs; its figures cover the other runs.")
    if absent:
        lines.append(f"{name}: no run with {absent} of scratch's FLOPs ({why}).")
    return lines


def _describe_seeds(missing: Iterable[dict]) -> str:
    """Formats missing runs as `seed 1 at 0.5 and seeds 2, 3 at 0.5, 1`; empty if there are none."""
    budgets: dict[int, list[str]] = {}
    for lost in missing:
        budgets.setdefault(lost["seed"], []).append(f"{lost['budget']:g}")
    seeds: dict[str, list[str]] = {}
    for seed, lost_at in budgets.items():
        seeds.setdefault(", ".join(lost_at), []).append(f"{seed}")
    return " and ".join(f"seed{'s' * (len(of) > 1)} {', '.join(of)} at {at}" for at, of in seeds.items())
