"""A comparison's file: the sections of a run, [compare], and one [arms.NAME] for each way of starting."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import RunConfig, apply_setting, read_toml
from megatron_ligo.config.typed_toml import read_section, setting

SCRATCH = "scratch"
START, FULL = "start", "full"  # the controls of a learned arm, after its name and a dot


@dataclass(frozen=True)
class CompareSection:
    seeds: tuple[int, ...] = setting((1, 2, 3), "of the data's order, of fresh numbers and of maps", low=0)
    scratch_steps: int = setting(1000, "steps of the scratch run; its FLOPs are the unit of every budget", low=1)
    budgets: tuple[float, ...] = setting((0.25, 0.5, 1.0), "FLOPs of a run, fit included, in that unit", above=0.0)
    lrs: tuple[float, ...] = setting((5e-4, 1e-3, 2e-3), "peak rates that each arm tries", above=0.0)
    tune_budget: float = setting(0.25, "FLOPs of a try, in the same unit", above=0.0)
    tune_seed: int = setting(0, "of the tries: none of `seeds`", low=0)
    tune_valid: tuple[str | float, ...] = setting((), "held-out prefixes of the tries; empty: data.valid", above=0.0)
    warmup: float = setting(0.1, "part of a run's steps that warms up", low=0.0, below=1.0)
    source_steps: int = setting(0, "trains the small model (sizes: small.path) so long; 0: it is given", low=0)
    source_lr: float = setting(1e-3, "peak rate of that training", above=0.0)
    source_flops: float | None = setting(None, "what a given small model cost; left out: unknown", low=0.0)
    launcher: str = setting("", "starts the ranks of a run: deepspeed --num_gpus 4 --module; empty: one process")


@dataclass(frozen=True)
class Arm:
    """A way of starting the large model. full: what a fit would read is trained on with all weights instead. lag: the
    fit is on the loss after so many steps of training from its start, which count."""

    name: str
    config: RunConfig
    grown: bool = True
    fitted: bool = False
    full: bool = False
    lag: int = 0


@dataclass(frozen=True)
class ComparisonConfig:
    config: RunConfig
    compare: CompareSection
    arms: tuple[Arm, ...]  # scratch first; each learned arm is followed by its controls

    def to_dict(self) -> dict:
        return {
            **self.config.to_dict(),
            "compare": asdict(self.compare),
            "arms": {a.name: _arm_table(a) for a in self.arms},
        }


def _arm_table(arm: Arm) -> dict:
    """What an arm's table says."""
    table = arm.config.to_dict()
    keys = [*(["operator"] if arm.grown else []), *(["fit"] if arm.fitted or arm.full else [])]
    return {key: table[key] for key in keys} | ({"lag": arm.lag} if arm.lag else {})


def load_comparison(path: Path, sets: Iterable[str] = ()) -> ComparisonConfig:
    """The comparison that a TOML file names, with `section.key=value` put over it. ConfigError with all faults."""
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
    for key in ("seeds", "budgets", "lrs"):
        found = getattr(section, key)
        # A run's folder is named by six digits of each.
        if not found or len({f"{value:g}" for value in found}) < len(found):
            errors.add(f"compare.{key}", "one or more, each once (to six digits)", list(found))
    if section.source_steps and section.source_flops is not None:
        errors.add("compare.source_flops", "left out where the small model is trained here", section.source_flops)
    if not config.data.valid:
        errors.add("data.valid", "held-out prefixes", "none", "Losses are compared on them.")
    if config.fit.lag:
        errors.add("fit.lag", "left out of a comparison", config.fit.lag, "Say arms.NAME.lag, a number of steps.")
    if not isinstance(named, dict) or not named:
        errors.add("arms", "one or more tables [arms.NAME]", "none", 'For example: operator = {method = "lossless"}')
        return
    for name, arm in named.items():
        unknown = sorted(set(arm) - {"operator", "fit", "lag"}) if isinstance(arm, dict) else ["no table"]
        if unknown:
            expected = "operator = {...} and, for a learned one, fit = {...} and lag, a number of steps"
            errors.add(f"arms.{name}", expected, ", ".join(unknown))
        elif any(not isinstance(arm[key], dict) for key in ("operator", "fit") if key in arm):
            errors.add(f"arms.{name}", "tables: operator = {...}, fit = {...}", arm)
        elif isinstance(arm.get("fit"), dict) and arm["fit"].get("lag"):
            errors.add(f"arms.{name}.fit.lag", "left out of a comparison", arm["fit"]["lag"], f"Say arms.{name}.lag.")
        elif "lag" in arm and (type(arm["lag"]) is not int or arm["lag"] < 1 or "fit" not in arm):
            errors.add(f"arms.{name}.lag", "one step or more, beside fit = {...}", arm["lag"])
        if name == SCRATCH or not re.fullmatch(r"[\w-]+", name, re.ASCII):
            expected = f"a name of letters, digits, _ and -, and not {SCRATCH}, which is always run"
            errors.add(f"arms.{name}", expected, repr(name))


def _arms(config: RunConfig, named: dict, path: Path) -> list[Arm]:
    base = config.to_dict()
    arms = []
    for name, table in named.items():
        own = {key: {**base[key], **table[key]} for key in ("operator", "fit") if key in table}
        config = RunConfig.from_dict({**base, **own}, f"{path}, arm {name}")
        arms.append(Arm(name, config, fitted="fit" in table, lag=table.get("lag", 0)))
    return arms


def with_controls(config: RunConfig, arms: Iterable[Arm]) -> tuple[Arm, ...]:
    """Scratch, the arms, and beside each learned one its start without a fit (given the FLOPs of the fit as training),
    and the same start with all weights trained on what the fit reads. Arms of one start, or one fit, share them."""
    arms = list(arms)
    found = [Arm(SCRATCH, config, grown=False)]
    for arm in arms:
        found.append(arm)
        if not arm.fitted:
            continue
        if unfitted_control(arm, [*arms, *found]) is None:
            found.append(replace(arm, name=f"{arm.name}.{START}", fitted=False, lag=0))
        if full_training_control(arm, found) is None:
            found.append(replace(arm, name=f"{arm.name}.{FULL}", fitted=False, full=True, lag=0))
    return tuple(found)


def unfitted_control(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """The arm that begins where a learned one does, and learns nothing."""
    same = (other for other in arms if other.grown and not other.fitted and not other.full)
    return next((other for other in same if other.config.operator == arm.config.operator), None)


def full_training_control(arm: Arm, arms: Iterable[Arm]) -> Arm | None:
    """The arm that trains all weights on what a learned one's fit reads."""
    same = (other for other in arms if other.full and other.config.operator == arm.config.operator)
    return next((other for other in same if other.config.fit == arm.config.fit), None)


def fitted_arm_of(control: Arm, arms: Iterable[Arm]) -> Arm:
    """The arm whose fit a full control stands beside."""
    same = (arm for arm in arms if arm.fitted and arm.config.operator == control.config.operator)
    return next(arm for arm in same if arm.config.fit == control.config.fit)


def select_arms(spec: ComparisonConfig, names: Iterable[str]) -> list[Arm]:
    """The arms of these names, all if none is named. ConfigError for an unknown one."""
    known = {arm.name: arm for arm in spec.arms}
    names = list(names)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigError(Problem("--only", f"some of {', '.join(known)}", ", ".join(wrong)))
    return [known[name] for name in names] if names else list(spec.arms)
