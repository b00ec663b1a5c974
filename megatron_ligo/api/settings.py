"""The config of a run from a file, sizes and settings: the same keys, checks and errors as a run.toml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict

import torch

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem
from megatron_ligo.config.run_config import LargeSection, RunConfig
from megatron_ligo.config.toml_tables import read_toml

# A run.toml, or its content.
ConfigSource = str | Path | Mapping[str, Mapping[str, object]] | None
# Values by "section.key", as --set takes them.
Settings = Mapping[str, object]
# Of weights: torch's own, its name, or the name that run.toml uses.
DType = torch.dtype | str
SHORT_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class LargeSizes(TypedDict, total=False):
    """The sizes of a large model, by the names of [large]. One that is left out or None is the small model's."""

    num_layers: int | None
    hidden_size: int | None
    ffn_size: int | None
    num_heads: int | None
    num_kv_heads: int | None
    head_dim: int | None
    vocab_size: int | None
    max_positions: int | None
    num_experts: int | None
    top_k: int | None
    renormalises_routing: bool | None
    shared_expert_ffn_size: int | None
    image_size: int | None


def build_config(config: ConfigSource, sizes: Mapping[str, object], *settings: Settings | None) -> RunConfig:
    """Returns a config: the file's, with the sizes that are not None in [large], and each of the settings in turn.

    Raises ConfigError with every problem.
    """
    check_type("config", config, str | Path | Mapping | None, "a run.toml, or its content as a dict")
    for group in settings:
        check_type("settings", group, Mapping | None, "a dict by section.key", 'Example: {"fit.lr": 1e-4}.')
    table = read_toml(Path(config)) if isinstance(config, str | Path) else _copy(config or {})
    large = {f"large.{name}": size for name, size in sizes.items() if size is not None}
    errors = ErrorCollector("settings", ConfigError)
    for name, value in (pair for group in (large, *settings) for pair in (group or {}).items()):
        _set(table, name, list(value) if isinstance(value, tuple) else value, errors)
    errors.raise_if_any()
    return RunConfig.from_dict(table, "config")


def check_type(where: str, value: object, types: type | UnionType, expected: str, hint: str = "") -> None:
    """Raises ConfigError unless an argument has one of these types; a truth value is no number."""
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise ConfigError(Problem(where, expected, describe(value), hint))


def describe(value: object) -> str:
    """Returns the begin of a value on one line, and its type, for an error."""
    return f"{' '.join(repr(value).split()):.40} ({type(value).__name__})"


def check_number(where: str, value: float, low: float, types: type | UnionType = int) -> None:
    """Raises ConfigError unless an argument is a number of these types, at least `low` and finite."""
    kind = "a whole number" if types is int else "a number"
    check_type(where, value, types, kind)
    if not low <= value < math.inf:
        raise ConfigError(Problem(where, f"{kind}, at least {low:g}", value))


def parse_dtype(dtype: DType | None) -> torch.dtype | None:
    """Returns the dtype of weights that an argument states; None: as they are. Raises ConfigError for any other."""
    if dtype is None:
        return None
    parsed = SHORT_NAMES.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ConfigError(Problem("dtype", "a dtype of weights, such as torch.bfloat16", repr(dtype)))
    return parsed


def select_sizes(values: Mapping[str, object]) -> dict[str, object]:
    """Returns the keys of [large] among some values."""
    return {name: values[name] for name in vars(LargeSection()) if name in values}


def _set(table: dict[str, Any], name: str, value: object, errors: ErrorCollector) -> None:
    *sections, key = name.split(".")
    if not sections:
        errors.add(name, "section.key", repr(name), 'Example: {"fit.lr": 1e-4}.')
        return
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            errors.add(name, "a section or a table", repr(table), f"{section!r} already has a plain value.")
            return
    table[key] = value


def _copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}
