"""The settings that a run's results depend on, and whether two runs have the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_ligo.common.errors import ConfigError, ErrorCollector
from megatron_ligo.config.run_config import SCRATCH, RunConfig

# Keys that may change between a run and its resumption: results depend on none of them, except for rounding.
CHANGEABLE_KEYS = (
    "save_every", "async_save", "keep_last", "timeout_minutes", "grace_seconds", "bad_numbers", "spike",
    "check_replicas_every", "replica_tolerance", "parallel", "micro_batch_size", "recompute", "source", "trackers",
    "tracker_project",
)  # fmt: skip
# Keys that name files. A run that has digests of their content is compared by these.
PATH_KEYS = ("small.path", "small.format", "fit.lag", "pretrain.start", "data.train", "data.valid", "data.tokenizer")


def run_identity(config: RunConfig, section: str, model_sections: Iterable[str]) -> dict:
    """Returns every setting that the results depend on, without the layout, as JSON values.

    section: "fit" or "pretrain". model_sections: the sections that define the model.
    """
    tables = config.to_dict()
    training = {key: value for key, value in tables[section].items() if key not in CHANGEABLE_KEYS}
    data = {key: value for key, value in tables["data"].items() if key != "cache"}
    return {name: tables[name] for name in model_sections} | {section: training, "data": data}


def check_same_run(saved: dict, current: dict, output: Path, by_content: bool = False) -> None:
    """Raises ConfigError with every setting that differs from those of the run to resume.

    by_content: of keys that name files, only how many files they name is compared.
    """
    errors = ErrorCollector(f"{output} holds a run with other settings", ConfigError)
    add_differences(saved, current, errors, by_content)
    errors.raise_if_any()


def add_differences(saved: dict, current: dict, errors: ErrorCollector, by_content: bool = False) -> None:
    """Adds an error for each setting that differs, as `check_same_run` raises them."""
    before, after, defaults = _flatten(saved), _flatten(current), _flatten(RunConfig().to_dict())
    if before.get("pretrain.start") == "":
        # Before scratch had a name, it had none.
        before["pretrain.start"] = SCRATCH
    for key in sorted(before.keys() | after.keys()):
        # A setting added after the run was written had its default value.
        expected, actual = before.get(key, defaults.get(key)), after.get(key)
        if by_content and key in PATH_KEYS:
            same = _without_paths(key, expected) == _without_paths(key, actual)
        else:
            same = expected == actual
        if not same:
            errors.add(key, expected, actual, "Resume with the same, or choose another --output.")


def _without_paths(key: str, value: object) -> object:
    if isinstance(value, list):
        return ["" if isinstance(entry, str) else entry for entry in value]
    if key == "pretrain.start":
        return value == SCRATCH
    # The tokenizer of a model need not be named.
    return bool(value) if key not in ("small.format", "data.tokenizer") else None


def _flatten(table: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in table.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
