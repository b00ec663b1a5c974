"""What a user did or has that cannot work: one exception family, one form of message.

`LigoError` is for faults of input (config, files, layouts, machines); our own mistakes are `assert`s.
Commands print it without a traceback and exit with `LigoError.exit_code`.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Callable, Iterable


class LigoError(Exception):
    """A fault of input. `str(error)` says where, what was expected, what was found, what to do."""

    exit_code = 2
    # True where every rank raises it, so that one of them may speak for all.
    agreed = False
    # What was collected, and what there is besides to be looked at (`Faults.raise_if_any`).
    faults: Faults | None = None
    rest: Callable[[], Iterable[tuple[str, object]]] | None = None


class ConfigError(LigoError):
    """A config key or value that cannot be used."""


class CheckpointError(LigoError):
    """A checkpoint (or operator file) that is damaged, incomplete, hostile or of another model."""


class DataError(LigoError):
    """Training data that are missing, damaged, too few, or made for another tokenizer or vocabulary."""


class LayoutError(LigoError):
    """Sizes, processes or devices that do not go together."""


class NumbersError(LigoError):
    """A loss or a gradient that no run should go on from. All ranks see it alike."""

    agreed = True


class ReplicaError(LigoError):
    """Ranks that must hold the same numbers and do not: a machine's fault, or one of ours."""


class LostRankError(LigoError):
    """Another rank has ended or does not answer."""


class Stopped(LigoError):
    """A signal came, all ranks have saved and end. Exit code: 128 + its number, as a shell says it."""

    agreed = True

    def __init__(self, signum: int, text: str):
        super().__init__(f"{signal.Signals(signum).name}: {text}")
        self.exit_code = 128 + signum


def message(where: str, expected: object, found: object, do: str = "") -> str:
    """The one form: `where: expected E, found F. What to do.`"""
    text = f"{where}: expected {expected}, found {found}."
    return f"{text} {do}" if do else text


def nearest(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest choice, or the list of choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(choices)}."


class Faults:
    """Collects every fault of one input so that the user sees all of them in one error."""

    def __init__(self, title: str, error: type[LigoError] = LigoError):
        self.title = title
        self.error = error
        self.lines: list[str] = []

    def add(self, where: str, expected: object, found: object, do: str = "") -> None:
        self.lines.append(message(where, expected, found, do))

    def note(self, line: str) -> None:
        self.lines.append(line)

    def raise_if_any(self, rest: Callable[[], Iterable[tuple[str, object]]] | None = None) -> None:
        """rest: gives the tensors that are there, with their names, to whoever asks what else is wrong with them."""
        if not self.lines:
            return
        shown = self.lines[:50]
        more = len(self.lines) - len(shown)
        if more:
            shown.append(f"... and {more} more of the same kind")
        count = len(self.lines)
        head = f"{self.title} ({count} fault{'s' if count > 1 else ''})"
        error = self.error("\n  ".join([head, *shown]))
        error.faults, error.rest = self, rest
        raise error
