"""What the libraries log: in a command it goes to a file of the run instead of the terminal, errors excepted.

Libraries bring handlers of their own, which write to the terminal. So every logger that is created after `install` asks
this module first, by the name of its package.
"""

from __future__ import annotations

import collections
import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

FILE_NAME = "libraries.log"
PACKAGE = __name__.partition(".")[0]
FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"
# Lines that are kept until the run's folder is known.
MAX_KEPT = 1000
# What stops libraries from drawing progress bars of their own.
NO_PROGRESS_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"

_kept: collections.deque[logging.LogRecord] = collections.deque(maxlen=MAX_KEPT)
_file: logging.FileHandler | None = None


class LibraryLogger(logging.getLoggerClass()):
    """A logger whose records below ERROR go to the run's file, unless it is one of this package."""

    def callHandlers(self, record: logging.LogRecord) -> None:
        if self.name.partition(".")[0] in (PACKAGE, "__main__") or record.levelno >= logging.ERROR:
            super().callHandlers(record)
        elif _file is None:
            _kept.append(record)
        else:
            _file.handle(record)


def install() -> None:
    """Keeps what libraries log, and the warnings of Python, off the terminal. Call it before they are imported."""
    logging.setLoggerClass(LibraryLogger)
    logging.captureWarnings(True)
    if any(action == "error" for action, *_ in warnings.filters):
        # -W error or PYTHONWARNINGS: libraries that only warn as they are imported would count as missing.
        warnings.simplefilter("default")
    if not sys.stderr.isatty():
        os.environ.setdefault(NO_PROGRESS_BARS, "1")


def write_to(folder: Path) -> None:
    """Writes what was logged so far, and what comes, to a file in a run's folder, if `install` was called."""
    global _file
    if logging.getLoggerClass() is not LibraryLogger or _file is not None:
        return
    _file = logging.FileHandler(folder / FILE_NAME, delay=True, encoding="utf-8")
    _file.setFormatter(logging.Formatter(FORMAT))
    while _kept:
        _file.handle(_kept.popleft())


@contextlib.contextmanager
def log_prints(library: str) -> Iterator[None]:
    """Logs what a library prints to stdout within this context, a record a line, if `install` was called."""
    if logging.getLoggerClass() is not LibraryLogger:
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            # Loggers of libraries leave out what is less than a warning.
            logging.getLogger(library).warning("printed: %s", line)


def kept_lines() -> list[str]:
    """Returns what was logged while no run's folder was known, for the report of a bug."""
    return [logging.Formatter(FORMAT).format(record) for record in _kept]
