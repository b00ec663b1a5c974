"""Errors that the user can act on: one exception family, one form of message.

`LigoError` reports bad input and machine failures (config, files, layouts, disks); bugs are `assert`s. Commands print
it without a traceback and exit with `LigoError.exit_code`.
"""

from __future__ import annotations

import difflib
import errno
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from megatron_ligo.common.terminal_text import one_line, printable

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
PERMISSION_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS)
# Failures of a local disk or a file server.
IO_ERRNOS = (errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.EUCLEAN)
EXISTING_ERRNOS = (errno.EEXIST, errno.ENOTEMPTY)
MISSING_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# What only a mistake of ours raises; a library's use of them is caught where the library is called.
BUGS = (LookupError, TypeError, AttributeError, AssertionError, NameError, NotImplementedError)
# Packages whose name is not that of their module.
PACKAGE_NAMES = {"megatron": "megatron-core", "PIL": "pillow"}
OUT_OF_MEMORY_TEXTS = ("out of memory", "can't allocate memory")
# The most problems that one message lists.
MAX_SHOWN = 50


class LigoError(Exception):
    """An error that the user can act on. `str(error)` states the place, what was expected and found, and a remedy."""

    exit_code = 2
    # True if every rank raises the same error, so that one of them reports it for all.
    agreed = False
    # Set by `ErrorCollector.raise_if_any`: the collected problems, and the tensors that can still be checked.
    collector: ErrorCollector | None = None
    remaining_tensors: Callable[[], Iterable[tuple[str, object]]] | None = None

    @property
    def problems(self) -> tuple[Problem | str, ...]:
        """Every problem that the error reports; a `Problem` if its fields are known."""
        return tuple(self.collector.problems) if self.collector else self.args


class ConfigError(LigoError):
    """An unusable config key or value."""


class CheckpointError(LigoError):
    """A checkpoint (or operator file) that is damaged, incomplete, unsafe to load or from another model."""


class DataError(LigoError):
    """Training data that are missing, damaged, too short, or prepared for another tokenizer or vocabulary."""


class LayoutError(LigoError):
    """Incompatible sizes, processes or devices."""


class NumbersError(LigoError):
    """A loss or gradient that training must not continue from. All ranks see the same one."""

    agreed = True


class ReplicaError(LigoError):
    """Replicas that differ between ranks: a hardware failure, or a bug."""


class MachineError(LigoError):
    """A full disk, or a missing permission, folder or package, on any rank. Finished work is kept."""


class LostRankError(LigoError):
    """Another rank has ended or does not respond."""


class Stopped(LigoError):
    """A signal arrived; all ranks have saved and exit. The exit code is 128 + signal number, as in a shell."""

    agreed = True

    def __init__(self, signum: int, text: str):
        super().__init__(f"{signal.Signals(signum).name}: {text}")
        self.exit_code = 128 + signum


class Problem(str):
    """One problem as text, `where: expected E, found F. Hint.`, with its parts as fields."""

    where: str
    expected: str
    found: str
    hint: str

    def __new__(cls, where: str, expected: object, found: object, hint: str = "") -> Problem:
        where, expected, found = map(one_line, (where, expected, found))
        text = f"{where}: expected {expected}, found {found}."
        problem = super().__new__(cls, f"{text} {hint}" if hint else text)
        problem.where, problem.expected, problem.found, problem.hint = where, expected, found, hint
        return problem

    def __getnewargs__(self) -> tuple[str, str, str, str]:
        return self.where, self.expected, self.found, self.hint


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Returns `Did you mean 'x'?` with the closest choice, or lists all choices."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(choices)}."


class ErrorCollector:
    """Collects all problems of one input and reports them in one error."""

    def __init__(self, title: str, error_type: type[LigoError] = LigoError):
        self.title = one_line(title)
        self.error_type = error_type
        self.problems: list[str] = []

    def add(self, where: str, expected: object, found: object, hint: str = "") -> None:
        self.problems.append(Problem(where, expected, found, hint))

    def add_message(self, message: str) -> None:
        """Adds a problem that is already formatted, such as another error's text."""
        self.problems.append(message if isinstance(message, Problem) else printable(message))

    def raise_if_any(self, remaining_tensors: Callable[[], Iterable[tuple[str, object]]] | None = None) -> None:
        """Raises one error with all problems, if there are any.

        remaining_tensors: yields the readable tensors by name, for callers that also check their values.
        """
        if not self.problems:
            return
        count = len(self.problems)
        shown = self.problems[:MAX_SHOWN]
        if count > MAX_SHOWN:
            shown.append(f"... and {count - MAX_SHOWN} more")
        head = f"{self.title} ({count} problem{'s' if count > 1 else ''})"
        error = self.error_type("\n  ".join([head, *shown]))
        error.collector, error.remaining_tensors = self, remaining_tensors
        raise error


def user_message(error: BaseException) -> str | None:
    """Returns the message for the user, or None if the error is a bug."""
    if isinstance(error, LigoError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BUGS):
            # Raised while a user's error was being handled, it hides a mistake of ours.
            return None
        text = _describe_machine_error(cause)
        if text:
            return text
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


@contextmanager
def machine_errors() -> Iterator[None]:
    """Raises MachineError, within this context or decorated function, for what the machine or environment lacks.

    Such as space, a permission, a path, memory or a package: everything that has a message for the user.
    """
    try:
        yield
    except LigoError:
        raise
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        raise MachineError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """True if an accelerator or this process has no memory left."""
    # torch's OutOfMemoryError, by name: this module works without torch.
    is_torchs = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return is_torchs or isinstance(error, MemoryError) or any(part in text for part in OUT_OF_MEMORY_TEXTS)


def describe_lack_of_memory(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    hint = "For a training: set recompute = true, lower micro_batch_size, or raise parallel.tp."
    return Problem("memory of the device", "enough for the next step", first_line, hint)


def _describe_missing_package(module: str) -> str | None:
    """Returns a message for a package that is not installed; None for a module of this one, which is a bug."""
    top = module.partition(".")[0]
    if top == __name__.partition(".")[0]:
        return None
    package = PACKAGE_NAMES.get(top, top)
    return Problem(f"module {module}", f"the package {package}", "none in this environment", f"pip install {package}")


def _describe_machine_error(error: BaseException) -> str | None:
    """Returns a message for an operating-system error, even if a library only repeats its text; None for others."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _describe_missing_package(error.name)
    if is_out_of_memory(error):
        return describe_lack_of_memory(error)
    code = error.errno if isinstance(error, OSError) else None
    # A failed copy has its source in `filename`, its target in `filename2`.
    where = getattr(error, "filename2", None) or getattr(error, "filename", None) or "writing"
    if code in NO_SPACE_ERRNOS or "No space left on device" in str(error):
        return f"{where}: expected free space on the disk, found it full. Free some, or choose another --output."
    if code in PERMISSION_ERRNOS:
        return (
            f"{where}: expected permission, found: {error.strerror}. Choose another folder, or change its permissions."
        )
    if code == errno.EISDIR:
        return f"{where}: expected a file, found a folder. Check the path."
    if code in MISSING_ERRNOS and error.filename is not None:
        return f"{where}: expected a file or folder, found: {error.strerror}. Check the path."
    if code in EXISTING_ERRNOS:
        return f"{where}: expected a folder, or a free path for one, found: {error.strerror}. Choose another --output."
    if code in IO_ERRNOS:
        return f"{where}: expected a working disk, found: {error.strerror}. See the system log."
    if code == errno.EFBIG:
        hint = "Raise the limit of this process with ulimit -f, or choose a folder on another file system."
        return f"{where}: expected room for the file, found the largest size that is allowed. {hint}"
    if code == errno.EADDRINUSE:
        return "the launcher's port: expected a free port, found it in use. Choose another with --master_port."
    if code == errno.EMFILE or "Too many open files" in str(error):
        return f"{where}: expected one more open file, found the limit of this process. Raise it with ulimit -n."
    return None


@contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Raises RuntimeError for a panic of a library in Rust (tokenizers), which is no Exception."""
    try:
        yield
    except BaseException as error:
        # Its class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError(f"{error}") from error
