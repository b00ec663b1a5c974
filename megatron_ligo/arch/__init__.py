"""Registry of model families. Each is defined by one file of data in families/ and named after it."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from megatron_ligo.arch import families
from megatron_ligo.arch.architecture import Architecture
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.common.errors import ConfigError, Problem

__all__ = ["Architecture", "ModelConfig", "architectures", "get"]


@cache
def architectures() -> dict[str, Architecture]:
    """Returns every architecture by name. Each module of families/ holds one, in upper case (`llama.LLAMA`)."""
    names = [m.name for m in pkgutil.iter_modules(families.__path__)]
    return {name: getattr(importlib.import_module(f"{families.__name__}.{name}"), name.upper()) for name in names}


def get(name: str) -> Architecture:
    """Returns an architecture by name. ConfigError if there is none."""
    known = architectures()
    if name not in known:
        raise ConfigError(Problem("arch", f"one of {', '.join(known)}", repr(name)[:60]))
    return known[name]
