"""Checkpoints with one rule broken each: a builder damages a good folder, and says words that the error must have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

Builder = Callable[[Path], tuple[str, ...]]


def of(table: dict[str, Builder]) -> Callable[[Builder], Builder]:
    """Notes a builder in a table under its name."""

    def note(builder: Builder) -> Builder:
        table[builder.__name__] = builder
        return builder

    return note


def edit_json(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
