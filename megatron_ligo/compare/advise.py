"""Advice for one growth: short probes of the methods on the user's own model and text, ranked by the loss after a lag.

The loss right after growth ranks methods badly (what preserves the function learns slower, or not); the loss after some
steps of training does better. It is still a probe: the advice says what it rests on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from megatron_ligo import formats
from megatron_ligo.arch.dims import Dims
from megatron_ligo.compare.jobs import Jobs
from megatron_ligo.compare.plan import Plan, Trained, output_folder
from megatron_ligo.compare.results import parameters
from megatron_ligo.compare.settings import SCRATCH, Arm, CompareSection, Spec
from megatron_ligo.config import Config, OperatorSection
from megatron_ligo.errors import ConfigError, LigoError, message
from megatron_ligo.growth.check import initial_operator
from megatron_ligo.growth.cost import fit_step_flops
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.jsonfile import write_json

ADVICE = "advice.json"
# `ligo` as it begins, too: without its fit it was the best start twice (tools/benchmarks/growth/shakespeare.md).
PROBED = tuple(name for name in METHODS if name != "random")
FITTED = "fitted"  # after a method's name and a dot
SEEDS = (1, 2)  # the second is for the two best only: it says how much a difference is worth
FEWEST = 10
FINALISTS = 2
GROWN_WELL = (2.0, 4.0)  # how many times larger, in the published gains (arXiv 2405.15319, 2605.13405)
TOKENS_A_PARAMETER = 20  # growth gains most below (arXiv 2605.13405)


def advise(
    config: Config,
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
    small = formats.open(config.small.path, None if config.small.format == "auto" else config.small.format).dims
    arms, refused = _arms(config, small, list(methods) or PROBED)
    spec = _spec(config, arms, lrs, steps=1)
    probes = len(spec.arms) * len(lrs) + FINALISTS * (2 if fit else 1)
    jobs = Jobs(output_folder(output), "", tell)
    lag = int(budget // (probes * Plan(spec, jobs, jobs.run).step_flops))
    if lag < FEWEST:
        needed = FEWEST * probes * Plan(spec, jobs, jobs.run).step_flops
        do = "Give more FLOPs, or name fewer --method or --lr."
        raise ConfigError(message("--flops", f"at least {needed:.3g}: {probes} probes of {FEWEST} steps", budget, do))
    spec = _spec(config, arms, lrs, lag)
    plan = Plan(spec, jobs, jobs.run)
    probed = {arm.name: _best([plan.train(arm, SEEDS[0], 1.0, lr) for lr in lrs]) for arm in spec.arms}
    ranked = sorted((run.loss, name) for name, run in probed.items() if run and name != SCRATCH)
    named = {arm.name: arm for arm in spec.arms}
    finalists = [name for _, name in ranked[:FINALISTS]]
    again = {name: plan.train(named[name], SEEDS[1], 1.0, probed[name].lr) for name in finalists}
    for name in finalists if fit else ():
        arm = replace(named[name], name=f"{name}.{FITTED}", fitted=True)
        if plan.steps(1.0, _fit_flops(arm.config, small, plan)) < 1:
            refused[arm.name] = f"its fit alone costs more than the {lag} steps of a probe"
            continue
        found = _best([plan.train(arm, SEEDS[0], 1.0, probed[name].lr)])
        if found is None:
            refused[arm.name] = "it diverged"
            continue
        probed[arm.name] = found
        ranked = sorted([*ranked, (found.loss, arm.name)])
    advice = {
        "lag_steps": lag,
        "probes": probes,
        "flops": probes * lag * plan.step_flops,
        "parameters": {"small": parameters(small), "large": parameters(plan.large)},
        "tokens_of_sample": plan.large.tokens_of_sample(config.data.seq_length),
        "ranking": [_row(name, probed[name], again.get(name)) for _, name in ranked],
        "scratch": _row(SCRATCH, probed[SCRATCH], None),
        "refused": refused,
    }
    advice["advice"] = _advice(advice, config)
    write_json(output / ADVICE, advice)
    return advice


def _arms(config: Config, small: Dims, methods: Iterable[str]) -> tuple[list[Arm], dict[str, str]]:
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


def _fit_flops(config: Config, small: Dims, plan: Plan) -> float:
    """What [fit] costs, before any of it is run."""
    fit, seq = config.fit, plan.large.tokens_of_sample(config.data.seq_length)
    operator = initial_operator(small, config.large, config.operator)
    step = fit_step_flops(operator, fit.global_batch_size * seq, seq, fit.distill > 0, bool(fit.lag))
    return min(fit.steps * step, fit.max_flops or math.inf)


def _spec(config: Config, arms: Iterable[Arm], lrs: Sequence[float], steps: int) -> Spec:
    compare = CompareSection(seeds=SEEDS, scratch_steps=steps, budgets=(1.0,), lrs=tuple(lrs))
    return Spec(config, compare, (Arm(SCRATCH, config, grown=False), *arms))


def _best(runs: Iterable[Trained | None]) -> Trained | None:
    ended = [run for run in runs if run and run.loss is not None]
    return min(ended, key=lambda run: run.loss, default=None)


def _row(name: str, run: Trained | None, again: Trained | None) -> dict:
    second = again.loss if again else None
    if run is None:
        return {"method": name, "lr": None, "at_once": None, "after_lag": None, "other_seed": None}
    return {"method": name, "lr": run.lr, "at_once": run.begun, "after_lag": run.loss, "other_seed": second}


def _advice(found: dict, config: Config) -> list[str]:
    """Sentences, each with the figure that it rests on."""
    ranking, scratch = found["ranking"], found["scratch"]
    if not ranking:
        return ["Every probe diverged: try lower rates."]
    first = ranking[0]
    said = [
        f"Take {first['method']} with a peak rate of {first['lr']:g}: {first['after_lag']:.4f} after "
        f"{found['lag_steps']} steps ({first['at_once']:.4f} at once)."
    ]
    if len(ranking) > 1:
        said.append(_runner_up(first, ranking[1]))
    if scratch["after_lag"] is not None:
        gap = scratch["after_lag"] - first["after_lag"]
        said.append(f"Scratch after the same steps: {scratch['after_lag']:.4f}, {gap:+.4f} against it.")
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


def _runner_up(first: dict, second: dict) -> str:
    gap = second["after_lag"] - first["after_lag"]
    told = f"Next: {second['method']}, {gap:+.4f}"
    if first["other_seed"] is None or second["other_seed"] is None:
        return f"{told}."
    other = second["other_seed"] - first["other_seed"]
    verdict = "a tie" if other * gap <= 0 else "the same order"
    return f"{told}; on another seed {other:+.4f}: {verdict}."
