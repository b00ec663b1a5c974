"""Validates all arms of a comparison before the first one runs: the last may start hours later."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megatron_ligo.common.errors import ConfigError, ErrorCollector, LigoError
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.experiments.compare.comparison_config import Arm, ComparisonConfig
from megatron_ligo.growth.operator import Operator
from megatron_ligo.growth.validation import build_initial_operator, check_factored
from megatron_ligo.training.fit import check_teacher
from megatron_ligo.training.initial_weights import check_layout, read_model_config, scratch_model_config
from megatron_ligo.training.lag import check_is_decoder


def check_shared(config: RunConfig) -> None:
    """Raises ConfigError with every file of [data] that is missing, or every mismatch of the large model's layout."""
    errors = ErrorCollector("config [data]", ConfigError)
    for split, entries in (("train", config.data.train), ("valid", config.data.valid)):
        for entry in (entry for entry in entries if isinstance(entry, str)):
            if not any(Path(f"{entry}{suffix}").is_file() for suffix in ("", ".idx")):
                hint = "Create it with `ligo prepare`; a relative path begins at the current folder."
                errors.add(f"data.{split}", "a prefix of prepared data, or a file of images", f"none at {entry}", hint)
    errors.raise_if_any()
    large = scratch_model_config(config)
    check_layout(large, config.pretrain.parallel, large.tokens_per_sample(config.data.seq_length))


def check_arms(spec: ComparisonConfig, arms: Iterable[Arm]) -> None:
    """Raises ConfigError with every arm that cannot grow the small model into the large one or cannot be fitted."""
    small = read_model_config(Path(spec.config.small.path), spec.config.small.accept)
    errors = ErrorCollector("invalid comparison", ConfigError)
    for arm in arms:
        if not arm.grown or arm.small:
            continue
        try:
            operator = build_initial_operator(small, arm.config.large, arm.config.operator)
            if arm.fitted:
                _check_fit(arm, operator)
        except LigoError as error:
            errors.add(
                f"arms.{arm.name}", "a valid operator, and one that can be fitted if the arm has a fit", f"{error}"
            )
    errors.raise_if_any()


def _check_fit(arm: Arm, operator: Operator) -> None:
    errors = ErrorCollector("the fit cannot run", ConfigError)
    check_factored(operator.settings, errors)
    length = operator.large.tokens_per_sample(arm.config.data.seq_length)
    check_teacher(operator, arm.config.fit, length, errors)
    if arm.lag:
        check_is_decoder(operator, errors)
    errors.raise_if_any()
