"""Advice for one growth: short probes of the methods on the user's own model and text, ranked by the loss after a lag.

The loss right after growth ranks methods badly (what preserves the function learns slower, or not); the loss after some
steps of training does better. It is still a probe: the advice says what it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats
from megatron_ligo.common.atomic_files import write_json
from megatron_ligo.common.errors import ConfigError, ErrorCollector, LigoError, Problem
from megatron_ligo.config.run_config import OperatorSection, RunConfig
from megatron_ligo.experiments.compare.arm_cost import fit_flops
from megatron_ligo.experiments.compare.arm_plan import ArmRun, ComparisonPlan, jobs_folder
from megatron_ligo.experiments.compare.comparison_config import SCRATCH, Arm, CompareSection, ComparisonConfig
from megatron_ligo.experiments.compare.results import count_parameters
from megatron_ligo.experiments.compare.run_queue import JobQueue
from megatron_ligo.experiments.compare.savings import TIE, UNKNOWN
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import initial_operator

ADVICE = "advice.json"
# `ligo` as it begins, too: without its fit it was the best start twice (tools/benchmarks/growth/shakespeare.md).
PROBED = tuple(name for name in METHODS if name != "random")
FITTED = "fitted"  # after a method's name and a dot
DIVERGED_NOTE = "it diverged"
SEEDS = (1, 2)  # the second is for the two best only: it says how much a difference is worth
MIN_PROBE_STEPS = 10
FINALISTS = 2
GROWN_WELL = (2.0, 4.0)  # how many times larger, in the published gains (arXiv 2405.15319, 2605.13405)
TOKENS_A_PARAMETER = 20  # growth gains most below (arXiv 2605.13405)


def advise(
    config: RunConfig,
    output: Path,
    budget: float,
    lrs: Sequence[float],
    methods: Iterable[str] = (),
    tell: Callable[[str], None] = lambda text: None,
    fit: bool = False,
) -> dict:
    """Probes the methods (none named: all that the sizes allow) within `budget` FLOPs; writes OUTPUT/advice.json.

    fit: the best ones are probed once more after [fit], whose FLOPs count: what a fit is worth shows after a lag, too.
    ConfigError if the budget pays for fewer than 10 steps a probe. Started again, it goes on where it stopped.
    """
    _check(budget, lrs, config)
    small = formats.open(config.small.path, None if config.small.format == "auto" else config.small.format).model_config
    arms, refused = _arms(config, small, list(methods) or PROBED)
    jobs = JobQueue(jobs_folder(output), "", tell)
    spec = probe_comparison(config, arms, lrs, lag=1)
    probes, step = count_probes(spec, fit), ComparisonPlan(spec, jobs, jobs.run).step_flops
    lag = int(budget // (probes * step))
    if lag < MIN_PROBE_STEPS:
        hint = "Give more FLOPs, or name fewer --method or --lr."
        needed = f"at least {MIN_PROBE_STEPS * probes * step:.3g}: {probes} probes of {MIN_PROBE_STEPS} steps"
        raise ConfigError(Problem("--flops", needed, budget, hint))
    found = rank_probes(ComparisonPlan(probe_comparison(config, arms, lrs, lag), jobs, jobs.run), small, refused, fit)
    write_json(output / ADVICE, found)
    return found


def rank_probes(plan: ComparisonPlan, small: ModelConfig, refused: dict[str, str], fit: bool) -> dict:
    """What the probes of a plan say. refused: by method why it was not probed; what has diverged comes to it."""
    spec, lag = plan.spec, plan.spec.compare.scratch_steps
    named = {arm.name: arm for arm in spec.arms}
    tries = {name: [plan.train(arm, SEEDS[0], 1.0, lr) for lr in spec.compare.lrs] for name, arm in named.items()}
    probed = {name: _best_run(runs) for name, runs in tries.items()}
    finalists = [name for name in _ranked(probed) if name != SCRATCH][:FINALISTS]
    for name in finalists if fit else ():
        arm = replace(named[name], name=f"{name}.{FITTED}", fitted=True)
        try:
            cost = fit_flops(arm.config, small)
        except LigoError as error:
            refused[arm.name] = f"{error}"
            continue
        if plan.steps(1.0, cost) < 1:
            refused[arm.name] = f"its fit alone costs more than the {lag} steps of a probe"
            continue
        named[arm.name], probed[arm.name] = arm, _best_run([plan.train(arm, SEEDS[0], 1.0, probed[name].lr)])
    last = [name for name in named if name.removesuffix(f".{FITTED}") in finalists and probed[name]]
    again = {name: _best_run([plan.train(named[name], SEEDS[1], 1.0, probed[name].lr)]) for name in last}
    refused |= {name: DIVERGED_NOTE for name, run in probed.items() if run is None}
    refused |= {_with_seed(name): DIVERGED_NOTE for name, run in again.items() if run is None}
    probes = count_probes(spec, fit)
    found = {
        "lag_steps": lag,
        "probes": probes,
        "flops": probes * lag * plan.step_flops,
        "parameters": {"small": count_parameters(small), "large": count_parameters(plan.large)},
        "tokens_of_sample": plan.large.tokens_of_sample(spec.config.data.seq_length),
        "ranking": [_probe_record(name, probed[name], again.get(name)) for name in _ranked(probed) if name != SCRATCH],
        "scratch": _probe_record(SCRATCH, probed[SCRATCH], None),
        "refused": refused,
    }
    return found | {"advice": _advice_lines(found, spec.config)}


def count_probes(spec: ComparisonConfig, fit: bool) -> int:
    """Of the probes: each arm at each rate, the finalists once more, and each one's fit on both seeds."""
    return len(spec.arms) * len(spec.compare.lrs) + FINALISTS * (3 if fit else 1)


def _check(budget: float, lrs: Sequence[float], config: RunConfig) -> None:
    errors = ErrorCollector("no advice can be given", ConfigError)
    for where, value in (("--flops", budget), *(("--lr", lr) for lr in lrs)):
        if not (math.isfinite(value) and value > 0):
            errors.add(where, "a finite number more than 0", value)
    if len(set(lrs)) < max(len(lrs), 1):
        errors.add("--lr", "one or more, each once", list(lrs))
    if not config.data.valid:
        errors.add("data.valid", "held-out prefixes", "none", "Losses are compared on them.")
    if config.fit.lag:
        errors.add("fit.lag", "left out: probes look at the loss after a lag", config.fit.lag)
    errors.raise_if_any()


def _arms(config: RunConfig, small: ModelConfig, methods: Iterable[str]) -> tuple[list[Arm], dict[str, str]]:
    """An arm for each method that can grow these sizes, and why the others cannot."""
    arms, refused = [], {}
    for name in methods:
        section = OperatorSection(method=name)
        try:
            initial_operator(small, config.large, section)
        except LigoError as error:
            refused[name] = f"{error}"
        else:
            arms.append(Arm(name, replace(config, operator=section)))
    if not arms:
        raise ConfigError("no method can grow these sizes:\n  " + "\n  ".join(refused.values()))
    return arms, refused


def probe_comparison(config: RunConfig, arms: Iterable[Arm], lrs: Sequence[float], lag: int) -> ComparisonConfig:
    compare = CompareSection(seeds=SEEDS, scratch_steps=lag, budgets=(1.0,), lrs=tuple(lrs))
    return ComparisonConfig(config, compare, (Arm(SCRATCH, config, grown=False), *arms))


def _best_run(runs: Iterable[ArmRun | None]) -> ArmRun | None:
    ended = [run for run in runs if run and run.loss is not None]
    return min(ended, key=lambda run: run.loss, default=None)


def _ranked(probed: dict[str, ArmRun | None]) -> list[str]:
    return sorted((name for name, run in probed.items() if run), key=lambda name: probed[name].loss)


def _with_seed(name: str) -> str:
    return f"{name}, seed {SEEDS[1]}"


def _probe_record(name: str, run: ArmRun | None, again: ArmRun | None) -> dict:
    second = again.loss if again else None
    if run is None:
        return {"method": name, "lr": None, "at_once": None, "after_lag": None, "other_seed": None}
    return {"method": name, "lr": run.lr, "at_once": run.begun, "after_lag": run.loss, "other_seed": second}


def _advice_lines(found: dict, config: RunConfig) -> list[str]:
    """Sentences, each with the figure that it rests on."""
    ranking, scratch = found["ranking"], found["scratch"]["after_lag"]
    if not ranking:
        return ["Every method diverged: try lower rates."]
    lost = [row for row in ranking if _with_seed(row["method"]) in found["refused"]]
    # One that diverged on a seed is taken only where nothing else is left.
    first, *others = sorted(ranking, key=lambda row: row in lost)
    lower = scratch is not None and scratch <= first["after_lag"]
    said = ["Scratch was lower: do not grow (at this lag)."] if lower else []
    said.append(
        f"{'The best growth:' if lower else 'Take'} {_as_config(first)}, with a peak rate of {first['lr']:g}: "
        f"{first['after_lag']:.4f} after {found['lag_steps']} steps ({first['at_once']:.4f} at once)."
    )
    said += [f"On another seed {_as_config(row)} diverged at {row['lr']:g}: not to be relied on." for row in lost]
    if others:
        said.append(_runner_up(first, others[0]))
    if scratch is None:
        said.append("Scratch diverged: whether growth is worth it, these probes cannot say. Try lower rates.")
    else:
        gap = scratch - first["after_lag"]
        said.append(f"Scratch after the same steps: {scratch:.4f}, {gap:+.4f} against it ({UNKNOWN}).")
    small, large = found["parameters"]["small"], found["parameters"]["large"]
    times, (low, high) = large / small, GROWN_WELL
    where = "within" if low <= times <= high else "outside of"
    said.append(f"{times:.1f} times the small model's parameters: {where} the 2 to 4 times of the published gains.")
    run = config.pretrain
    tokens = run.steps * run.global_batch_size * found["tokens_of_sample"]
    said.append(
        f"[pretrain] plans {tokens / large:.2g} tokens a parameter. Growth gains most below {TOKENS_A_PARAMETER}; far "
        "above, or from a small model that was hardly trained, scratch catches up. A probe cannot see that far: "
        "tools/compare.py can."
    )
    return said


def _as_config(row: dict) -> str:
    """As a config has it."""
    name = row["method"].removesuffix(f".{FITTED}")
    return f"method = '{name}'{' with [fit]' if name != row['method'] else ''}"


def _runner_up(first: dict, second: dict) -> str:
    gap = second["after_lag"] - first["after_lag"]
    told = f"Next: {_as_config(second)}, {gap:+.4f}"
    if first["other_seed"] is None or second["other_seed"] is None:
        return f"{told} ({UNKNOWN})."
    other = second["other_seed"] - first["other_seed"]
    # What is told as 0.0000 is no difference.
    same = round(gap, 4) * round(other, 4) > 0
    return f"{told}; on another seed {other:+.4f}: {'the same order' if same else f'a {TIE}'}."
