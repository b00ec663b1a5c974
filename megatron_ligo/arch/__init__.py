"""What each family of networks is made of: one file a family, found by looking into this folder."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from megatron_ligo.arch.dims import Dims
from megatron_ligo.arch.rows import Architecture
from megatron_ligo.errors import ConfigError, nearest

__all__ = ["Architecture", "Dims", "architectures", "get"]

_VOCABULARY = {"axes", "dims", "modules", "rows"}


@cache
def architectures() -> dict[str, Architecture]:
    """Every architecture by name: each module of this folder holds one in upper case (`llama.LLAMA`)."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name not in _VOCABULARY]
    return {name: getattr(importlib.import_module(f"{__name__}.{name}"), name.upper()) for name in names}


def get(name: str) -> Architecture:
    known = architectures()
    if name not in known:
        raise ConfigError(f"there is no architecture {name!r}. {nearest(name, known)}")
    return known[name]
