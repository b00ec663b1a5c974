"""Recommends a growth method: short probes on the user's own model and text, ranked by the loss after a lag.

The loss right after growth ranks methods badly (a function-preserving start may learn more slowly); the loss after a
share of the planned run ranks them better. Many candidates are halved: each round has probes of twice the length for
the better half. Short probes prove little, so the advice states its evidence.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import formats
from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import ConfigError, ErrorCollector, LigoError, Problem
from megatron_ligo.common.folder_kinds import COMPARISON, check_output
from megatron_ligo.config.run_config import OperatorSection, ParallelSection, RunConfig
from megatron_ligo.experiments.compare.arm_cost import fit_flops
from megatron_ligo.experiments.compare.arm_plan import ArmRun, ComparisonPlan, jobs_folder
from megatron_ligo.experiments.compare.arm_validation import check_shared
from megatron_ligo.experiments.compare.comparison_config import SCRATCH, Arm, CompareSection, ComparisonConfig
from megatron_ligo.experiments.compare.results import count_parameters
from megatron_ligo.experiments.compare.run_queue import JobQueue
from megatron_ligo.experiments.compare.savings import TIE, UNKNOWN
from megatron_ligo.growth.methods import METHODS
from megatron_ligo.growth.validation import build_initial_operator

ADVICE, SPEED = "advice.json", "speed.json"
# Includes the unfitted `ligo`: it was the best start twice (tools/benchmarks/growth/shakespeare.md).
PROBED = tuple(name for name in METHODS if name != "random")
FITTED = "fitted"  # suffix of a method's name
SEPARATOR = ","  # between a method and the values tried with it
DIVERGED_NOTE = "it diverged"
SEEDS = (1, 2)  # the second, for the finalists only, shows whether a difference persists
MIN_PROBE_STEPS = 10
FINALISTS = 2
LAST_ROUND = 2 * FINALISTS  # candidates (a start at a rate) that are not halved any more
ENOUGH_SHARE = 0.3  # of a run: ranks there agreed with those at its end (tools/benchmarks/growth/README.md)
GROWN_WELL = (2.0, 4.0)  # growth ratios of the published gains (arXiv 2405.15319, 2605.13405)
TOKENS_PER_PARAMETER = 20  # growth gains most below this (arXiv 2605.13405)


def advise(
    config: RunConfig,
    output: Path,
    budget: float,
    lrs: Sequence[float],
    methods: Iterable[str] = (),
    log_line: Callable[[str], None] = lambda text: None,
    fit: bool = False,
    launcher: str = "",
    minutes: float | None = None,
    tried: Mapping[str, Sequence[object]] = MappingProxyType({}),
) -> dict:
    """Probes the methods (default: all that the sizes allow) within `budget` FLOPs; writes OUTPUT/advice.json.

    tried: values of [operator] keys; each method is probed with each combination of them that it accepts. fit: also
    probes the finalists after [fit], whose FLOPs count. launcher: as in [compare]; empty: probes run in one process
    each, whatever layout the config has, as their losses do not depend on it. minutes: the budget is what this machine
    computes in that time. Raises ConfigError if the budget pays for fewer than 10 steps per probe. An interrupted call
    resumes.
    """
    check_output(output, COMPARISON)
    if not launcher:
        config = _in_one_process(config)
    jobs = JobQueue(jobs_folder(output), launcher, log_line)
    _check(budget if minutes is None else 1.0, lrs, config)
    check_shared(config)
    small = formats.open_small(config.small).model_config
    arms, refused = candidates(config, small, list(methods) or PROBED, tried)
    step = ComparisonPlan(probe_comparison(config, arms, lrs, lag=1), jobs, jobs.run).step_flops
    price, unit = step, "flops"
    if minutes is not None:
        budget, unit = minutes, "minutes"
        price = step / (60 * _measure_speed(config, arms, lrs, jobs, output))
    rounds, first = choose_rounds(budget / price, len(arms), len(lrs), fit, price, unit)
    plan = ComparisonPlan(probe_comparison(config, arms, lrs, first << (rounds - 1)), jobs, jobs.run)
    record = rank_probes(plan, small, refused, fit, rounds)
    write_json(output / ADVICE, record)
    return record


def choose_rounds(
    steps: float, arms: int, rates: int, fit: bool, price: float = 1.0, unit: str = "flops"
) -> tuple[int, int]:
    """Returns the number of rounds and the steps of a probe in the first, for a budget in steps.

    price: of a step in `unit`, that of the user's budget: flops or minutes. As many rounds as the candidates need, or
    as leave the first probes long enough. Raises ConfigError if none does.
    """
    most = 1 + max(0, math.ceil(math.log2(arms * rates / LAST_ROUND)))
    for rounds in range(most, 0, -1):
        first = int(steps // _cost_of_rounds(rounds, arms, rates, fit))
        if first >= MIN_PROBE_STEPS:
            return rounds, first
    probes = _cost_of_rounds(1, arms, rates, fit)
    least = MIN_PROBE_STEPS * probes * price
    digit = 10.0 ** (math.floor(math.log10(least)) - 1)
    needed = f"at least {math.ceil(least / digit) * digit:.3g}: {probes} probes of {MIN_PROBE_STEPS} steps"
    hint = f"Raise --{unit}, or pass fewer --method, --try or --lr."
    raise ConfigError(Problem(f"--{unit}", needed, f"{steps * price:.3g}, enough for {int(steps)} steps", hint))


def _cost_of_rounds(rounds: int, arms: int, rates: int, fit: bool) -> int:
    """Returns the steps of all probes together, in those of one probe of the first round."""
    # Scratch keeps its best rate after the first round.
    candidates = [-(-arms * rates // 2**number) + (1 if number else rates) for number in range(rounds)]
    candidates[-1] += FINALISTS * (3 if fit else 1)
    return sum(count * 2**number for number, count in enumerate(candidates))


def _in_one_process(config: RunConfig) -> RunConfig:
    alone = ParallelSection()
    return replace(config, fit=replace(config.fit, parallel=alone), pretrain=replace(config.pretrain, parallel=alone))


def _measure_speed(config: RunConfig, arms: Iterable[Arm], lrs: Sequence[float], jobs: JobQueue, output: Path) -> float:
    """Returns this machine's FLOPs per second in a probe of the fewest steps, its start-up included."""
    record = output / SPEED
    if not record.is_file():
        plan = ComparisonPlan(probe_comparison(config, arms, lrs, MIN_PROBE_STEPS), jobs, jobs.run)
        start = time.monotonic()
        plan.train(plan.spec.arms[0], SEEDS[0], 1.0, lrs[0])
        seconds = time.monotonic() - start
        write_json(record, {"flops_per_second": MIN_PROBE_STEPS * plan.step_flops / seconds})
    return read_json(record)["flops_per_second"]


def rank_probes(plan: ComparisonPlan, small: ModelConfig, refused: dict[str, str], fit: bool, rounds: int = 1) -> dict:
    """Runs and ranks a plan's probes. refused: the reason for each method not probed; diverged probes are added.

    The plan's unit is a probe of the last round.
    """
    spec, lag = plan.spec, plan.spec.compare.scratch_steps
    arms = {arm.name: arm for arm in spec.arms}
    tries, halved = _halve(plan, arms, rounds)
    probed = {name: _best_run(runs) for name, runs in tries.items()}
    finalists = [name for name in _ranked(probed) if name != SCRATCH][:FINALISTS]
    for name in finalists if fit else ():
        arm = replace(arms[name], name=f"{name}.{FITTED}", fitted=True)
        try:
            cost = fit_flops(arm.config, small)
        except LigoError as error:
            refused[arm.name] = f"{error}"
            continue
        if plan.steps(1.0, cost) < 1:
            refused[arm.name] = f"its fit alone costs more than a probe of {lag} steps"
            continue
        arms[arm.name], probed[arm.name] = arm, _best_run([plan.train(arm, SEEDS[0], 1.0, probed[name].lr)])
    last = [name for name in arms if name.removesuffix(f".{FITTED}") in finalists and probed.get(name)]
    second_seed = {name: _best_run([plan.train(arms[name], SEEDS[1], 1.0, probed[name].lr)]) for name in last}
    refused |= {name: DIVERGED_NOTE for name, run in probed.items() if run is None}
    refused |= {_with_seed(name): DIVERGED_NOTE for name, run in second_seed.items() if run is None}
    cost = _cost_of_rounds(rounds, len(spec.arms) - 1, len(spec.compare.lrs), fit)
    record = {
        "lag_steps": lag,
        "rounds": halved,
        "flops": cost * (lag >> (rounds - 1)) * plan.step_flops,
        "parameters": {"small": count_parameters(small), "large": count_parameters(plan.large)},
        "tokens_of_sample": plan.large.tokens_per_sample(spec.config.data.seq_length),
        "ranking": [
            _probe_record(name, probed[name], second_seed.get(name)) for name in _ranked(probed) if name != SCRATCH
        ],
        "scratch": _probe_record(SCRATCH, probed[SCRATCH], None),
        "refused": refused,
    }
    record |= {"advice": _advice_lines(record, spec.config)}
    return record | {"toml": _to_toml(record, {name: arm.config.operator for name, arm in arms.items()})}


def _halve(
    plan: ComparisonPlan, arms: dict[str, Arm], rounds: int
) -> tuple[dict[str, list[ArmRun | None]], list[dict]]:
    """Runs the rounds: the last round's probes by arm, and {"steps", "dropped"} of each round before it.

    A probe of round i takes 2 ** i steps of the first; the better half of the starts at their rates goes on. Scratch
    stays to the end, at its best rate.
    """
    rates = list(plan.spec.compare.lrs)
    candidates = [(name, lr) for name in arms if name != SCRATCH for lr in rates]
    diverged, halved = [], []
    for number in range(rounds - 1):
        budget = 2.0 ** (number - rounds + 1)
        runs = {(name, lr): plan.train(arms[name], SEEDS[0], budget, lr) for name, lr in candidates}
        scratch = _best_run(plan.train(arms[SCRATCH], SEEDS[0], budget, lr) for lr in rates)
        rates = [scratch.lr] if scratch else rates
        ended = {key: run for key, run in runs.items() if run and run.loss is not None}
        ordered = sorted(ended, key=lambda key: ended[key].loss)
        candidates, dropped = ordered[: -(-len(candidates) // 2)], ordered[-(-len(candidates) // 2) :]
        lost = [key for key in runs if key not in ended]
        diverged += [name for name, _ in lost if name not in {kept for kept, _ in ordered}]
        records = [{"method": name, "lr": lr, "loss": ended[name, lr].loss} for name, lr in dropped]
        records += [{"method": name, "lr": lr, "loss": None} for name, lr in lost]
        halved.append({"steps": round(budget * plan.spec.compare.scratch_steps), "dropped": records})
    tries: dict[str, list[ArmRun | None]] = {name: [] for name in diverged}
    for name, lr in [(SCRATCH, lr) for lr in rates] + candidates:
        tries.setdefault(name, []).append(plan.train(arms[name], SEEDS[0], 1.0, lr))
    return tries, halved


def _to_toml(record: dict, sections: Mapping[str, OperatorSection]) -> str:
    """Returns the recommended settings as parts of a config; empty if every method diverged. sections: by arm."""
    if not record["ranking"]:
        return ""
    first = _recommended(record)[0]
    name = first["method"].removesuffix(f".{FITTED}")
    tried = name.split(SEPARATOR)[1:]
    keys = {"method", *(each.partition("=")[0] for each in tried)}
    operator = "\n".join(f"{key} = {json.dumps(asdict(sections[name])[key])}" for key in sorted(keys, reverse=True))
    rate = f"lr = {first['lr']!r}\ngrown_peak = 1.0  # the probes' rate, unscaled"
    return f"[operator]\n{operator}\n\n[pretrain]\n{rate}\n"


def _recommended(record: dict) -> list[dict]:
    """Returns the ranking without preference for methods that diverged on a seed: those come last."""
    return sorted(record["ranking"], key=lambda row: _with_seed(row["method"]) in record["refused"])


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
        errors.add("fit.lag", "no value: probes measure the loss after a lag themselves", config.fit.lag)
    errors.raise_if_any()


def candidates(
    config: RunConfig, small: ModelConfig, methods: Iterable[str], tried: Mapping[str, Sequence[object]]
) -> tuple[list[Arm], dict[str, str]]:
    """Returns an arm for each method and combination of tried values that fits these sizes; why each other does not."""
    arms, refused = [], {}
    combinations = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    for method, values in product(methods, combinations):
        name = SEPARATOR.join([method, *(f"{key}={value}" for key, value in values.items())])
        try:
            operator = RunConfig.from_dict({"operator": {"method": method, **values}}, "--try").operator
            build_initial_operator(small, config.large, operator)
        except LigoError as error:
            refused[name] = f"{error}"
        else:
            arms.append(Arm(name, replace(config, operator=operator)))
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


def _probe_record(name: str, run: ArmRun | None, second_seed: ArmRun | None) -> dict:
    second = second_seed.loss if second_seed else None
    if run is None:
        return {"method": name, "lr": None, "at_once": None, "after_lag": None, "other_seed": None}
    return {"method": name, "lr": run.lr, "at_once": run.begun, "after_lag": run.loss, "other_seed": second}


def _advice_lines(record: dict, config: RunConfig) -> list[str]:
    """Returns the advice as sentences, each with its figures."""
    ranking, scratch = record["ranking"], record["scratch"]["after_lag"]
    if not ranking:
        return ["Every method diverged: try lower rates."]
    diverged = [row for row in ranking if _with_seed(row["method"]) in record["refused"]]
    # A method that diverged on a seed is recommended only if every other one did.
    first, *others = _recommended(record)
    scratch_wins = scratch is not None and scratch <= first["after_lag"]
    lines = ["Scratch was lower: do not grow (at this lag)."] if scratch_wins else []
    lines.append(
        f"{'The best growth:' if scratch_wins else 'Use'} {_as_config(first)} with a peak learning rate of "
        f"{first['lr']:g}: loss {first['after_lag']:.4f} after {record['lag_steps']} steps "
        f"({first['at_once']:.4f} right after growth)."
    )
    lines += [f"{_as_config(row)} diverged at {row['lr']:g} on another seed: unreliable." for row in diverged]
    if others:
        lines.append(_runner_up(first, others[0]))
    if scratch is None:
        lines.append("Scratch diverged: these probes cannot say whether growth pays. Try lower rates.")
    else:
        gap = scratch - first["after_lag"]
        lines.append(f"Scratch after the same steps: {scratch:.4f}, {gap:+.4f} relative to it ({UNKNOWN}).")
    small, large = record["parameters"]["small"], record["parameters"]["large"]
    times, (low, high) = large / small, GROWN_WELL
    where = "within" if low <= times <= high else "outside"
    lines.append(f"{times:.1f} times the small model's parameters: {where} the published range of 2 to 4 times.")
    run = config.pretrain
    if run.steps and record["lag_steps"] < ENOUGH_SHARE * run.steps:
        lines.append(
            f"The longest probes took {record['lag_steps'] / run.steps:.0%} of the planned {run.steps} steps: ranks "
            f"before {ENOUGH_SHARE:.0%} of a run often turn (ligo compare)."
        )
    tokens = run.steps * run.global_batch_size * record["tokens_of_sample"]
    lines.append(
        f"[pretrain] plans {tokens / large:.2g} tokens per parameter. Growth gains most below {TOKENS_PER_PARAMETER}; "
        "far above, or from a barely trained small model, scratch catches up. Probes are too short to show it: "
        "`ligo compare` can."
    )
    return lines


def _as_config(row: dict) -> str:
    """Returns a method's name as written in a config."""
    name = row["method"].removesuffix(f".{FITTED}")
    method, *values = name.split(SEPARATOR)
    text = " ".join([f"method = '{method}'", *(value.replace("=", " = ") for value in values)])
    return f"{text}{' with [fit]' if name != row['method'] else ''}"


def _runner_up(first: dict, second: dict) -> str:
    gap = second["after_lag"] - first["after_lag"]
    text = f"Next: {_as_config(second)}, {gap:+.4f}"
    if first["other_seed"] is None or second["other_seed"] is None:
        return f"{text} ({UNKNOWN})."
    other = second["other_seed"] - first["other_seed"]
    # A difference that rounds to 0.0000 counts as none.
    same = round(gap, 4) * round(other, 4) > 0
    return f"{text}; on another seed {other:+.4f}: {'the same order' if same else f'a {TIE}'}."
