"""Checkpoints with one defect each: a builder damages a good checkpoint and returns the problems to be reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.common.errors import Problem


@dataclass(frozen=True)
class ProblemPattern:
    """Text that the fields of one reported problem must contain."""

    where: str = ""
    expected: str = ""
    found: str = ""

    def matches(self, problem: str) -> bool:
        return isinstance(problem, Problem) and all(
            text in field
            for text, field in (
                (self.where, problem.where),
                (self.expected, problem.expected),
                (self.found, problem.found),
            )
        )


class Exactly(tuple):
    """Patterns of all reported problems: there must be no others."""


def problem(where: str = "", expected: str = "", found: str = "") -> tuple[ProblemPattern, ...]:
    return (ProblemPattern(where, expected, found),)


def exactly(*patterns: tuple[ProblemPattern, ...]) -> Exactly:
    return Exactly(pattern for group in patterns for pattern in group)


Builder = Callable[[Path], tuple[ProblemPattern | str, ...]]


def register(table: dict[str, Builder]) -> Callable[[Builder], Builder]:
    """Adds the decorated builder to a table under its name."""

    def add(builder: Builder) -> Builder:
        table[builder.__name__] = builder
        return builder

    return add


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
