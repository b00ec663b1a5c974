"""Reads a comparison's TOML file: the sections of a run, [compare], and one [arms.NAME] per start."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.config.toml_tables import apply_setting, read_toml
from megatron_ligo.config.typed_toml import read_section, setting

SCRATCH = "scratch"
ARM_KEYS = {"operator", "fit", "lag", "codes", "scratch", "small", "source_steps"}
WSD = "wsd"
START, FULL = "start", "full"  # suffixes of a fitted arm's two controls


@dataclass(frozen=True)
class CompareSection:
    seeds: tuple[int, ...] = setting((1, 2, 3), "seeds of data order, random initialisation and maps", low=0)
    scratch_steps: int = setting(1000, "steps of the scratch run; its FLOPs are the unit of all budgets", low=1)
    budgets: tuple[float, ...] = setting((0.25, 0.5, 1.0), "FLOPs per run, fit included, in that unit", above=0.0)
    lrs: tuple[float, ...] = setting((5e-4, 1e-3, 2e-3), "peak learning rates to tune each arm over", above=0.0)
    extend_lrs: int = setting(0, "rates to add beyond either edge of lrs while the best is at that edge", low=0)
    fit_lrs: tuple[float, ...] = setting(
        (), "peak rates to tune each fit over, by the end of its tuning runs; empty: each arm's fit.lr", above=0.0
    )
    tune_budget: float = setting(0.25, "FLOPs of a tuning run, in the same unit", above=0.0)
    tune_seed: int = setting(0, "seed of the tuning runs; not one of `seeds`", low=0)
    tune_valid: tuple[str | float, ...] = setting((), "held-out prefixes for tuning; empty: data.valid", above=0.0)
    warmup: float = setting(0.1, "fraction of a run's steps used for warm-up", low=0.0, below=1.0)
    decay: float = setting(
        0.2, "with pretrain.schedule = wsd: fraction of a run's steps in which the rate decays", above=0.0, below=1.0
    )
    source_steps: int = setting(
        0, "steps to train the small model (sizes: small.path); 0: use small.path itself", low=0
    )
    source_lr: float = setting(1e-3, "peak learning rate of that training", above=0.0)
    source_seeds: tuple[int, ...] = setting(
        (0,), "seeds of small models to train: the first seed of `seeds` grows the first one, and so on, in turn", low=0
    )
    source_valid: tuple[str | float, ...] = setting(
        (), "held-out text of the small model's own domain: each run's last loss on it is given too", above=0.0
    )
    source_flops: float | None = setting(None, "training FLOPs of a given small model; left out: unknown", low=0.0)
    launcher: str = setting("", "launcher of each run, e.g. deepspeed --num_gpus 4 --module; empty: one process")


@dataclass(frozen=True)
class Arm:
    """A way to start the large model.

    full: a control that trains all weights on the fit's batches. lag: the fit minimises the loss after this many
    training steps, whose FLOPs count. codes: it starts with token codes, whose FLOPs count. small: the small model
    itself trains on, for as many FLOPs. source_steps: of the small model that it grows; 0: compare.source_steps.
    variant: the folder, within the arm's, of the jobs with one of the tuned rates of its fit.
    """

    name: str
    config: RunConfig
    grown: bool = True
    fitted: bool = False
    full: bool = False
    lag: int = 0
    codes: bool = False
    small: bool = False
    source_steps: int = 0
    variant: str = ""

    @property
    def folder(self) -> str:
        """The folder of its jobs."""
        return f"{self.name}/{self.variant}" if self.variant else self.name


@dataclass(frozen=True)
class ComparisonConfig:
    config: RunConfig
    compare: CompareSection
    arms: tuple[Arm, ...]  # scratch first; each fitted arm is followed by its controls

    def to_dict(self) -> dict:
        return {
            **self.config.to_dict(),
            "compare": asdict(self.compare),
            "arms": {a.name: _arm_table(a) for a in self.arms},
        }


def _arm_table(arm: Arm) -> dict:
    """Returns an arm's table as written in a config."""
    time = {"source_steps": arm.source_steps} if arm.source_steps else {}
    if arm.small:
        return {"small": True} | time
    table = arm.config.to_dict()
    keys = [*(["operator"] if arm.grown else []), *(["fit"] if arm.fitted or arm.full else [])]
    own = {key: table[key] for key in keys} | ({"lag": arm.lag} if arm.lag else {})
    return own | time | ({"codes": True, "scratch": not arm.grown} if arm.codes else {})


def load_comparison(path: Path, sets: Iterable[str] = ()) -> ComparisonConfig:
    """Reads a comparison from TOML with `section.key=value` overrides. Raises ConfigError with all faults."""
    errors = ErrorCollector(f"comparison {path}", ConfigError)
    table = read_toml(path)
    for text in sets:
        apply_setting(table, text, errors)
    section = read_section(CompareSection, table.pop("compare", {}), errors, "compare.")
    named = table.pop("arms", {})
    config = RunConfig.from_dict(table, f"{path}")
    _check(section, config, named, errors)
    errors.raise_if_any()
    return ComparisonConfig(config, section, with_controls(config, _arms(config, named, path)))


def _check(section: CompareSection, config: RunConfig, named: object, errors: ErrorCollector) -> None:
    if section.tune_seed in section.seeds:
        errors.add("compare.tune_seed", f"none of compare.seeds {list(section.seeds)}", section.tune_seed)
    for key in ("seeds", "budgets", "lrs", "source_seeds", *(["fit_lrs"] if section.fit_lrs else [])):
        values = getattr(section, key)
        # Run folders are named by six significant digits of each value.
        if not values or len({f"{value:g}" for value in values}) < len(values):
            errors.add(f"compare.{key}", "one or more values that differ in six digits", list(values))
    if section.source_steps and section.source_flops is not None:
        errors.add("compare.source_flops", "no value: the small model is trained here", section.source_flops)
    fits = [config.fit.max_flops, config.fit.patience]
    for arm in named.values() if isinstance(named, dict) else ():
        own = arm.get("fit") if isinstance(arm, dict) else None
        fits += [own.get("max_flops"), own.get("patience")] if isinstance(own, dict) else []
    if section.fit_lrs and any(fits):
        hint = "The control of full training trains for the fit's steps, which must not depend on its rate."
        errors.add("compare.fit_lrs", "no values beside fit.max_flops or fit.patience", list(section.fit_lrs), hint)
    if not config.data.valid:
        errors.add("data.valid", "held-out prefixes", "none", "Losses are measured on them.")
    if config.pretrain.decay_steps:
        hint = "With pretrain.schedule = 'wsd', compare.decay sets it for each budget."
        errors.add("pretrain.decay_steps", "no value in a comparison", config.pretrain.decay_steps, hint)
    if config.fit.lag:
        errors.add("fit.lag", "no value in a comparison", config.fit.lag, "Set arms.NAME.lag to a number of steps.")
    if not isinstance(named, dict) or not named:
        errors.add("arms", "one or more tables [arms.NAME]", "none", 'For example: operator = {method = "lossless"}')
        return
    for name, arm in named.items():
        unknown = sorted(set(arm) - ARM_KEYS) if isinstance(arm, dict) else ["no table"]
        if unknown:
            expected = (
                "operator = {...} and, for a fitted arm, fit = {...} and lag (steps); codes, scratch, small (booleans)"
            )
            errors.add(f"arms.{name}", expected, ", ".join(unknown))
        elif any(type(arm.get(key, False)) is not bool for key in ("codes", "scratch", "small")):
            errors.add(f"arms.{name}", "booleans: codes, scratch, small", arm)
        elif arm.get("small") and not set(arm) <= {"small", "source_steps"}:
            expected = "no other key but source_steps beside small = true: the small model trains on as it is"
            errors.add(f"arms.{name}", expected, arm)
        elif arm.get("scratch") and (set(arm) != {"codes", "scratch"} or not arm["codes"]):
            errors.add(f"arms.{name}", "codes = true and no other key beside scratch = true", arm)
        elif any(not isinstance(arm[key], dict) for key in ("operator", "fit") if key in arm):
            errors.add(f"arms.{name}", "tables: operator = {...}, fit = {...}", arm)
        elif isinstance(arm.get("fit"), dict) and arm["fit"].get("lag"):
            errors.add(f"arms.{name}.fit.lag", "no value in a comparison", arm["fit"]["lag"], f"Set arms.{name}.lag.")
        elif "lag" in arm and (type(arm["lag"]) is not int or arm["lag"] < 1 or "fit" not in arm):
            errors.add(f"arms.{name}.lag", "at least one step, together with fit = {...}", arm["lag"])
        if isinstance(arm, dict) and "source_steps" in arm:
            _check_source_steps(section, name, arm["source_steps"], errors)
        if name == SCRATCH or not re.fullmatch(r"[\w-]+", name, re.ASCII):
            expected = f"a name of letters, digits, _ and -, other than {SCRATCH}"
            errors.add(f"arms.{name}", expected, repr(name))


def _check_source_steps(section: CompareSection, name: str, steps: object, errors: ErrorCollector) -> None:
    if type(steps) is not int or steps < 1:
        errors.add(f"arms.{name}.source_steps", "at least one step", steps)
    elif not section.source_steps:
        hint = "Set compare.source_steps too: the small model is given, not trained here."
        errors.add(f"arms.{name}.source_steps", "no value", steps, hint)


def _arms(config: RunConfig, named: dict, path: Path) -> list[Arm]:
    base = config.to_dict()
    arms = []
    for name, table in named.items():
        own = {key: {**base[key], **table[key]} for key in ("operator", "fit") if key in table}
        config = RunConfig.from_dict({**base, **own}, f"{path}, arm {name}")
        grown, codes = not table.get("scratch", False), table.get("codes", False)
        small = table.get("small", False)
        arm = Arm(name, config, grown, "fit" in table, lag=table.get("lag", 0), codes=codes, small=small)
        arms.append(replace(arm, source_steps=table.get("source_steps", 0)))
    return arms


def with_controls(config: RunConfig, arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Adds scratch and the controls of each fitted arm.

    The controls: the same start without a fit, trained for the fit's FLOPs as well; and the same start with all
    weights trained on the fit's batches. Arms with the same start or fit share controls.
    """
    arms = list(arms)
    with_added = [Arm(SCRATCH, config, grown=False)]
    for arm in arms:
        with_added.append(arm)
        if not arm.fitted:
            continue
        if unfitted_control(arm, [*arms, *with_added]) is None:
            with_added.append(replace(arm, name=f"{arm.name}.{START}", fitted=False, lag=0))
        if full_training_control(arm, with_added) is None:
            with_added.append(replace(arm, name=f"{arm.name}.{FULL}", fitted=False, full=True, lag=0))
    return tuple(with_added)


def unfitted_control(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """Returns the arm with a fitted arm's start and no fit."""
    starts = (other for other in arms if other.grown and not (other.fitted or other.full or other.small))
    same = (other for other in starts if (other.codes, other.source_steps) == (arm.codes, arm.source_steps))
    return next((other for other in same if other.config.operator == arm.config.operator), None)


def full_training_control(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """Returns the arm that trains all weights on a fitted arm's batches."""
    same = (other for other in arms if other.full)
    same = (other for other in same if (other.codes, other.source_steps) == (arm.codes, arm.source_steps))
    same = (other for other in same if other.config.operator == arm.config.operator)
    return next((other for other in same if other.config.fit == arm.config.fit), None)


def fitted_arm_of(control: Arm, arms: Iterable[Arm]) -> Arm:
    """Returns the fitted arm of a full-training control."""
    same = (arm for arm in arms if arm.fitted)
    same = (arm for arm in same if (arm.codes, arm.source_steps) == (control.codes, control.source_steps))
    same = (arm for arm in same if arm.config.operator == control.config.operator)
    return next(arm for arm in same if arm.config.fit == control.config.fit)


def select_arms(spec: ComparisonConfig, names: Iterable[str]) -> list[Arm]:
    """Returns the named arms, or all. Raises ConfigError for an unknown name."""
    known = {arm.name: arm for arm in spec.arms}
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(Problem("--only", f"some of {', '.join(known)}", ", ".join(unknown)))
    return [known[name] for name in names] if names else list(spec.arms)
