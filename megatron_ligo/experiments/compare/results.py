"""The results of a comparison as plain data: what results.json holds, and what the page shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from math import prod

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
from megatron_ligo.experiments.compare.savings import difference, saving

FEW_SEEDS, FEW_STEPS, SMALL_MODEL = 3, 1000, 10**8
DIVERGED, NO_RUN = "diverged", "no run"


def collect_results(plan: ComparisonPlan, arms: Iterable[Arm]) -> dict:
    """Everything that is done so far, from the jobs' results."""
    spec, source = plan.spec, plan.source()
    found = {arm.name: run_arm(plan, arm) for arm in arms}
    scratch = {run.seed: (run.flops, run.loss) for run in found[SCRATCH]["runs"] if _ended_at(run, 1.0)}
    cost = source["flops"] if source else None
    samples = spec.config.pretrain.eval_samples
    missing = {arm.name: _missing(spec.compare, arm, found[arm.name]["runs"]) for arm in arms}
    table, of = {}, (len(spec.compare.seeds), len(spec.compare.budgets))
    for arm in arms:
        runs = found[arm.name]["runs"]
        points = _points(runs)
        extra = {"source_free": saving(points, scratch, 0.0, *of).summary}
        counted = saving(points, scratch, cost or 0.0, *of).summary if arm.grown else extra["source_free"]
        extra["source_counted"] = counted if cost is not None or not arm.grown else "unknown: the source's cost is"
        table[arm.name] = {
            "grown": arm.grown,
            "fit": arm.fitted,
            "full": arm.full,
            "lr": found[arm.name]["lr"],
            "tries": {f"{lr:g}": run.loss for lr, run in found[arm.name]["tries"].items()},
            "runs": [asdict(run) for run in runs],
            "missing": missing[arm.name],
            "saved": extra,
        }
    return {
        "settings": spec.to_dict(),
        "small": source and {key: source[key] for key in ("flops", "loss")},
        "parameters": {"large": count_parameters(plan.large)},
        "large": plan.large.to_json(),
        "unit_flops": plan.unit,
        "held_out": {"samples": samples, "tokens": samples * plan.large.tokens_of_sample(spec.config.data.seq_length)},
        "arms": table,
        "differences": _differences(plan, {name: each["runs"] for name, each in found.items()}),
        "cautions": cautions(plan, found, missing),
        "versions": library_versions(),
    }


def count_parameters(model_config: ModelConfig) -> int:
    arch = architectures.get(model_config.arch)
    return sum(prod(arch.param(key).shape(model_config)) for key in arch.keys(model_config))


def _ended_at(run: ArmRun, budget: float) -> bool:
    return run.budget == budget and run.loss is not None


def _missing(compare: CompareSection, arm: Arm, runs: Iterable[ArmRun]) -> list[dict]:
    """Every run without a loss, and why: it has diverged, or there is none."""
    made = {(run.seed, run.budget): run.loss for run in runs}
    lost = [key for key in planned_runs(compare, arm) if made.get(key) is None]
    return [{"seed": key[0], "budget": key[1], "why": DIVERGED if key in made else NO_RUN} for key in lost]


def _points(runs: Iterable[ArmRun]) -> dict[int, list[tuple[float, float]]]:
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        if run.loss is not None:
            points.setdefault(run.seed, []).append((run.flops, run.loss))
    return points


def _differences(plan: ComparisonPlan, runs: dict[str, list[ArmRun]]) -> list[dict]:
    """Each learned arm against its controls, each grown one against scratch and against the lowest unlearned one."""
    pairs = []
    arms = plan.spec.arms
    for arm in arms:
        if arm.fitted:
            pairs += [
                (arm.name, control.name) for control in (unfitted_control(arm, arms), full_training_control(arm, arms))
            ]
        if arm.grown:
            pairs.append((arm.name, SCRATCH))
    told = []
    for budget in sorted(plan.spec.compare.budgets):
        losses = {name: {run.seed: run.loss for run in made if _ended_at(run, budget)} for name, made in runs.items()}
        unlearned = _best_unlearned(arms, losses)
        more = [(arm.name, unlearned) for arm in arms if arm.grown and unlearned not in (None, arm.name)]
        for name, other in dict.fromkeys([*pairs, *more]):
            found = difference(losses.get(name, {}), losses.get(other, {}))
            if found:
                told.append({"budget": budget, "arm": name, "against": other, **asdict(found)})
    return told


def _best_unlearned(arms: Iterable[Arm], losses: dict[str, dict[int, float]]) -> str | None:
    names = [arm.name for arm in arms if arm.grown and not arm.fitted and not arm.full and losses.get(arm.name)]
    # Seeds differ by more than arms do: one that lacks some is no lowest beside one that has them.
    return min(names, key=lambda name: (-len(losses[name]), sum(losses[name].values())), default=None)


def cautions(plan: ComparisonPlan, found: dict[str, dict], missing: dict[str, list[dict]]) -> list[str]:
    """What a reader must know before he believes a figure."""
    compare, config = plan.spec.compare, plan.spec.config
    said = []
    if len(compare.seeds) < FEW_SEEDS:
        said.append(f"{len(compare.seeds)} seed(s): a difference between arms may be chance.")
    if compare.scratch_steps < FEW_STEPS or count_parameters(plan.large) < SMALL_MODEL:
        tokens = compare.scratch_steps * config.pretrain.global_batch_size
        tokens *= plan.large.tokens_of_sample(config.data.seq_length)
        size = f"{count_parameters(plan.large) / 1e6:.3g}M parameters and {tokens / 1e6:.3g}M tokens"
        said.append(f"A small experiment ({size} for scratch): it says nothing of much larger models or budgets.")
    if len(compare.lrs) == 1:
        said.append(f"One rate, {compare.lrs[0]:g}, for all arms: none is tuned, and one may be favoured.")
    elif not compare.tune_valid:
        said.append("Rates were chosen on the held-out text that the results are from (tune_valid is empty).")
    said += _selection_notes(plan.spec.arms)
    rates = compare.lrs
    for name, each in found.items():
        if len(rates) > 1 and each["lr"] in (min(rates), max(rates)):
            edge = "lowest" if each["lr"] == min(rates) else "highest"
            said.append(f"{name}: its best rate is the {edge} tried, {each['lr']:g}: a better one may lie beyond.")
        said += _missing_runs_notes(name, missing[name], each["tries"])
    if any(lost["budget"] == 1.0 for lost in missing[SCRATCH]):
        said.append("What is saved is told of those seeds only on which scratch ended.")
    source, whole = plan.source(), [run.loss for run in found[SCRATCH]["runs"] if _ended_at(run, 1.0)]
    if source and source["loss"] is not None and whole and source["loss"] <= max(whole):
        what = f"The small model itself ended at {source['loss']:.4f}, not above scratch ({max(whole):.4f})"
        said.append(f"{what}: what is saved is its own work as much as the growth's.")
    said.append(
        "All seeds grow one small model. The fit counts in every figure of its arm; the tries for a rate, the same "
        "for each arm, in none. Many arms on few seeds: the lowest is partly the luckiest."
    )
    return said


def _selection_notes(arms: Iterable[Arm]) -> list[str]:
    """The arms whose fit has been helped by the text of the results."""
    fits = {arm.name: arm.config.fit for arm in arms if arm.fitted}
    names = [name for name, fit in fits.items() if fit.keep == "best" or (fit.patience and fit.eval_every)]
    if not names:
        return []
    return [
        f"{', '.join(names)}: held-out losses choose the operator that a fit keeps, or when it ends (fit.keep, "
        "fit.patience), on data.valid, the text that the results are from; tune_valid changes nothing in this. "
        "Evaluations cost no FLOPs here, those that choose among them."
    ]


def _missing_runs_notes(name: str, missing: Iterable[dict], tries: dict[float, ArmRun]) -> list[str]:
    diverged = _describe_seeds(lost for lost in missing if lost["why"] == DIVERGED)
    absent = _describe_seeds(lost for lost in missing if lost["why"] == NO_RUN)
    why = "not done, or what comes before it diverged or costs as much"
    if tries and all(tried.loss is None for tried in tries.values()):
        why = "every try for a rate diverged"
    said = []
    if diverged:
        said.append(f"{name}: diverged with {diverged} of scratch's FLOPs; its figures are of the runs that ended.")
    if absent:
        said.append(f"{name}: no run with {absent} of scratch's FLOPs ({why}).")
    return said


def _describe_seeds(missing: Iterable[dict]) -> str:
    """`seed 1 at 0.5 and seeds 2, 3 at 0.5, 1`; empty where there are none."""
    budgets: dict[int, list[str]] = {}
    for lost in missing:
        budgets.setdefault(lost["seed"], []).append(f"{lost['budget']:g}")
    seeds: dict[str, list[str]] = {}
    for seed, lost_at in budgets.items():
        seeds.setdefault(", ".join(lost_at), []).append(f"{seed}")
    return " and ".join(f"seed{'s' * (len(of) > 1)} {', '.join(of)} at {at}" for at, of in seeds.items())
