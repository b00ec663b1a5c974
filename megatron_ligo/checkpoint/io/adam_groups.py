"""Adam's parameter-group settings, read from any checkpoint and written as Megatron-core reads them.

Megatron-core's optimizer takes its groups, including betas and eps, from the checkpoint. It has two: matrices, and
vectors (norms, biases) without weight decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from torch import Tensor

from megatron_ligo.checkpoint.format import FormatOptions
from megatron_ligo.config.typed_toml import setting

PARAMS = "params"
STEP = "step"
# The settings that identify a Megatron-core group, besides its learning rates.
GROUP_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
SHARED_SETTINGS = ("betas", "eps", "lr")


@dataclass(frozen=True)
class AdamRates(FormatOptions):
    """Options of the formats that write Megatron-core's Adam groups."""

    max_lr: int | float | None = setting(
        None,
        "highest learning rate of the run that loads Adam's moments (default: a Megatron source's own)",
        low=0,
    )
    min_lr: int | float | None = setting(
        None,
        "lowest one; Megatron-core 0.19 requires both, and loads moments only if they are the run's own",
        low=0,
    )

    def rates(self) -> dict[str, int | float]:
        """Returns the rates that were given, by name."""
        return {name: rate for name, rate in (("max_lr", self.max_lr), ("min_lr", self.min_lr)) if rate is not None}


def read_settings(groups: object) -> tuple[dict[str, object], ...]:
    """Returns the distinct settings of an optimizer's groups: plain values only, without steps and parameters."""
    distinct: dict[str, dict[str, object]] = {}
    for group in groups if isinstance(groups, list | tuple) else ():
        if isinstance(group, Mapping):
            values = {name: _plain_value(value) for name, value in group.items() if name not in (PARAMS, STEP)}
            plain = {str(name): value for name, value in values.items() if value is not NotImplemented}
            if plain:
                distinct.setdefault(repr(plain), plain)
    return tuple(distinct.values())


def _plain_value(value: object) -> object:
    """Returns a number, string, bool, None or tuple of numbers; NotImplemented for any other value."""
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else NotImplemented
    if isinstance(value, list | tuple):
        return tuple(value) if all(isinstance(number, int | float) for number in value) else NotImplemented
    return value if value is None or isinstance(value, bool | int | float | str) else NotImplemented


def explain_unsupported(groups: Sequence[Mapping[str, object]]) -> str:
    """Explains why Megatron-core's groups cannot be derived from these; "" if they can."""
    required = SHARED_SETTINGS[:2] if _are_megatron_groups(groups) else (*SHARED_SETTINGS, "weight_decay")
    missing = [name for name in required if not groups or not all(_has_setting(group, name) for group in groups)]
    if missing:
        return f"the source does not state {' and '.join(missing)}, which Megatron-core takes from its checkpoint"
    if not _are_megatron_groups(groups):
        differing = [name for name in SHARED_SETTINGS if len({group[name] for group in groups}) > 1]
        if len({group["weight_decay"] for group in groups} - {0}) > 1:
            differing.append("weight_decay")
        if differing:
            return f"the source's groups differ in {' and '.join(differing)}, Megatron-core's cannot"
    return ""


def to_megatron_groups(groups: Sequence[Mapping[str, object]], rates: Mapping[str, object]) -> list[dict[str, object]]:
    """Returns Megatron-core's groups for any that `explain_unsupported` accepts. rates: from `AdamRates.rates`."""
    if _are_megatron_groups(groups):
        return [{**group, **rates} for group in groups]
    decay = max(group["weight_decay"] for group in groups)
    undecayed = min(group["weight_decay"] for group in groups)
    shared = {name: groups[0][name] for name in SHARED_SETTINGS} | {
        # Required by Transformer Engine's Adam; torch's Adam always applies it.
        "bias_correction": groups[0].get("bias_correction", True),
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        **rates,
    }
    return [{**shared, "weight_decay": decay, "wd_mult": 1.0}, {**shared, "weight_decay": undecayed, "wd_mult": 0.0}]


def is_undecayed(group: Mapping[str, object]) -> bool:
    """True for Megatron-core's group of vectors, which has no weight decay."""
    return group.get("wd_mult", group.get("pre_wd_mult")) == 0


def parse_step(step: object) -> int | None:
    """Parses an optimizer's step count: a number, or a tensor with one element. None for anything else."""
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    is_count = isinstance(step, int | float) and isfinite(step) and step >= 0 and step == int(step)
    return int(step) if is_count else None


def _has_setting(group: Mapping[str, object], name: str) -> bool:
    value = group.get(name)
    numbers = value if isinstance(value, tuple) else (value,)
    return all(map(_is_non_negative, numbers)) and len(numbers) == (2 if name == "betas" else 1)


def _is_non_negative(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < inf


def _are_megatron_groups(groups: Sequence[Mapping[str, object]]) -> bool:
    return bool(groups) and all(name in group or f"pre_{name}" in group for group in groups for name in GROUP_IDENTITY)
