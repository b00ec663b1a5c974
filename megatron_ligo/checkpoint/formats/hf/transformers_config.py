"""A family's own config class in transformers, for the values that a config.json leaves out."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from megatron_ligo.common.errors import CheckpointError, Problem


def load_transformers_config(config: Mapping, where: str) -> object:
    """Returns transformers' config object of a config.json. Raises CheckpointError if transformers refuses it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # transformers modifies the dicts that it is given.
    try:
        return CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(dict(config)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(Problem(where, "a config that transformers accepts", reason)) from None
