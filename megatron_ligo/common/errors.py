"""What a user did or has that cannot work: one exception family, one form of message.

`LigoError` is for faults of input (config, files, layouts, machines); our own mistakes are `assert`s.
Commands print it without a traceback and exit with `LigoError.exit_code`.
"""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Callable, Iterable

FULL = (errno.ENOSPC, errno.EDQUOT)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
# Of a disk, or of a server that has it.
FAILED = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EUCLEAN, errno.EFBIG)
TAKEN = (errno.EEXIST, errno.ENOTEMPTY)
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


class LigoError(Exception):
    """A fault of input. `str(error)` says where, what was expected, what was found, what to do."""

    exit_code = 2
    # True where every rank raises it, so that one of them may speak for all.
    agreed = False
    # What was collected, and what there is besides to be looked at (`ErrorCollector.raise_if_any`).
    errors: ErrorCollector | None = None
    rest: Callable[[], Iterable[tuple[str, object]]] | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """Each fault that the error reports; a `Problem` where its parts are known."""
        return tuple(self.errors.lines) if self.errors else self.args


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


class MachineError(LigoError):
    """A full disk, a right or a folder that is missing, on whichever process: what is done so far stays done."""


class LostRankError(LigoError):
    """Another rank has ended or does not answer."""


class Stopped(LigoError):
    """A signal came, all ranks have saved and end. Exit code: 128 + its number, as a shell says it."""

    agreed = True

    def __init__(self, signum: int, text: str):
        super().__init__(f"{signal.Signals(signum).name}: {text}")
        self.exit_code = 128 + signum


class Problem(str):
    """One fault in the one form: `where: expected E, found F. Hint.` Its parts stay readable as fields."""

    where: str
    expected: str
    found: str
    hint: str

    def __new__(cls, where: str, expected: object, found: object, hint: str = "") -> Problem:
        text = f"{where}: expected {expected}, found {found}."
        problem = super().__new__(cls, f"{text} {hint}" if hint else text)
        problem.where, problem.expected, problem.found, problem.hint = where, str(expected), str(found), hint
        return problem

    def __getnewargs__(self) -> tuple[str, str, str, str]:
        return self.where, self.expected, self.found, self.hint


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest choice, or the list of choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(choices)}."


class ErrorCollector:
    """Collects every fault of one input so that the user sees all of them in one error."""

    def __init__(self, title: str, error: type[LigoError] = LigoError):
        self.title = title
        self.error = error
        self.lines: list[str] = []

    def add(self, where: str, expected: object, found: object, hint: str = "") -> None:
        self.lines.append(Problem(where, expected, found, hint))

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
        error.errors, error.rest = self, rest
        raise error


def user_message(error: Exception) -> str | None:
    """What to tell the user, or None if the error is a mistake of ours."""
    if isinstance(error, LigoError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        text = _machine_fault(cause)
        if text:
            return text
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def _machine_fault(error: BaseException) -> str | None:
    """Libraries wrap the system's errors, or only repeat their text."""
    code = error.errno if isinstance(error, OSError) else None
    # A copy names what it reads first.
    where = getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing"
    if code in FULL or "No space left on device" in str(error):
        return f"{where}: expected room on the disk, found it full. Free some, or choose another --output."
    if code in DENIED:
        return f"{where}: expected permission, found: {error.strerror}. Choose another place, or change its rights."
    if code in MISSING and error.filename is not None:
        return f"{where}: expected a file or folder, found: {error.strerror}. Check the path."
    if code in TAKEN:
        return f"{where}: expected a folder, or a place for one, found: {error.strerror}. Choose another --output."
    if code in FAILED:
        return f"{where}: expected a disk that works, found: {error.strerror}. See the machine's own log."
    if code == errno.EADDRINUSE:
        return "the launcher's port: expected a free one, found it in use. Choose another with --master_port."
    if code == errno.EMFILE:
        return f"{where}: expected an open file more, found this process's limit. Raise it with ulimit -n."
    return None
