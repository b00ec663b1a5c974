"""The benchmarks that the README quotes. Each measures ratios within one run.

A benchmark is a module bench_NAME.py of this folder, found by scanning it; NAME is the subcommand of tools/bench.py:
    HELP: str                                  what it measures, in one line
    add_arguments(parser) -> None              adds its options
    measure(args, folder: Path) -> dict        results as JSON; works in `folder`, which is removed afterwards
    format_text(results: dict) -> str          the results for reading
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

__all__ = ["load_benchmarks"]

PREFIX = "bench_"


@cache
def load_benchmarks() -> dict[str, ModuleType]:
    """Imports every benchmark module and returns them by name."""
    names = [module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX): importlib.import_module(f"{__name__}.{name}") for name in names}
