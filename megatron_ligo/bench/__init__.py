"""The benchmarks that the README quotes. Each measures ratios within one run.

A benchmark is a module bench_NAME.py of this folder, found by scanning it; NAME is the argument of `ligo bench`:
    HELP: str                                  what it measures, in one line
    add_arguments(parser) -> None              adds its options
    measure(args, folder: Path) -> dict        results as JSON; works in `folder`, which is removed afterwards
    format_text(results: dict) -> str          the results for reading
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from types import ModuleType

__all__ = ["describe_benchmarks", "load_benchmark"]

PREFIX = "bench_"


def describe_benchmarks() -> dict[str, str]:
    """Returns the HELP of every benchmark by name, read from its source: importing all of them takes seconds."""
    summaries = {}
    for path in sorted(Path(__file__).parent.glob(f"{PREFIX}*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HELP":
                summaries[path.stem.removeprefix(PREFIX)] = ast.literal_eval(node.value)
    return summaries


def load_benchmark(name: str) -> ModuleType:
    """Imports one benchmark's module."""
    return importlib.import_module(f"{__name__}.{PREFIX}{name}")
