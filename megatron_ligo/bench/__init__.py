"""The measurements that the README quotes, as ratios in one run: one module each, found by looking into this folder.

A measurement is one module with
    HELP: str                                  one line on what is measured
    arguments(parser) -> None                  adds its own options
    measure(args, folder: Path) -> dict        JSON; works in `folder`, which is removed afterwards
    as_text(found: dict) -> str                the same for reading
Its file is bench_NAME.py; NAME is the subcommand of tools/bench.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

__all__ = ["load_measurements"]

PREFIX = "bench_"


@cache
def load_measurements() -> dict[str, ModuleType]:
    """Every measurement by name."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): importlib.import_module(f"{__name__}.{name}") for name in names}
