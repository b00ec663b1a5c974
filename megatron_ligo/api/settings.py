"""The config of a run from a file, sizes and settings: the same keys, checks and errors as a run.toml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.config.run_config import LargeSection, RunConfig
from megatron_ligo.config.toml_tables import read_toml

# A run.toml, or its content.
ConfigSource = str | Path | Mapping[str, Mapping[str, object]] | None
# Values by "section.key", as --set takes them.
Settings = Mapping[str, object]


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
    table = read_toml(Path(config)) if isinstance(config, str | Path) else _copy(config or {})
    large = {f"large.{name}": size for name, size in sizes.items() if size is not None}
    errors = ErrorCollector("settings", ConfigError)
    for name, value in (pair for group in (large, *settings) for pair in (group or {}).items()):
        _set(table, name, list(value) if isinstance(value, tuple) else value, errors)
    errors.raise_if_any()
    return RunConfig.from_dict(table, "config")


def select_sizes(values: Mapping[str, object]) -> dict[str, object]:
    """Returns the keys of [large] among some values."""
    return {name: values[name] for name in vars(LargeSection()) if name in values}


def _set(table: dict, name: str, value: object, errors: ErrorCollector) -> None:
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


def _copy(table: Mapping) -> dict:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}
