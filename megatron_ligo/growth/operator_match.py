"""Checks that a fitted operator is the one that a config asks for."""

from __future__ import annotations

from dataclasses import asdict

from megatron_ligo.common.errors import ErrorCollector
from megatron_ligo.config.run_config import LargeSection, OperatorSection
from megatron_ligo.growth.methods import resolve_settings
from megatron_ligo.growth.operator_file import OperatorFile
from megatron_ligo.growth.validation import derive_large_config


def check_matches_config(
    operator: OperatorFile, large: LargeSection, settings: OperatorSection, errors: ErrorCollector
) -> None:
    """Adds an error for each size of [large] and each key of [operator] that differs from the operator's.

    A section without any key states nothing. In a section with keys, those left out have their usual meaning.
    """
    hint = "Leave the section out to apply the operator as it was fitted, or fit another one."
    if any(value is not None for value in vars(large).values()):
        stated = derive_large_config(operator.small, large)
        for name in vars(large):
            fitted_size, stated_size = getattr(operator.large, name), getattr(stated, name)
            if fitted_size != stated_size:
                errors.add(f"large.{name}", f"the operator's {fitted_size}", stated_size, hint)
    if settings != OperatorSection():
        fitted, stated = asdict(operator.settings), asdict(resolve_settings(settings, operator.large))
        for name, value in fitted.items():
            if stated[name] != value:
                errors.add(f"operator.{name}", f"the operator's {value!r}", repr(stated[name]), hint)
