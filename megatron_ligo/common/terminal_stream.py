"""stdout and stderr of a command: printable text only and, for a training, discarded once the reader is gone."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from megatron_ligo.common.terminal_text import printable

log = logging.getLogger(__name__)

# A pipe without a reader; a terminal that is gone.
GONE_ERRNOS = (errno.EPIPE, errno.EIO, errno.ENXIO)


class TerminalStream:
    """A text stream that escapes what could move the cursor or forge a line; otherwise the wrapped stream.

    outlives_reader: set while a reader that is gone must not end the process.
    """

    outlives_reader = False

    def __init__(self, stream: IO[str]):
        self.raw = stream
        with suppress(AttributeError):
            # A name that the terminal's encoding lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def write(self, text: str) -> int:
        # Progress bars of libraries return to the start of their line first.
        start = "\r" if text.startswith("\r") else ""
        with self._survive():
            self.raw.write(start + printable(text[len(start) :]))
        return len(text)

    def flush(self) -> None:
        with self._survive():
            self.raw.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.raw, name)

    @contextmanager
    def _survive(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self.outlives_reader or error.errno not in GONE_ERRNOS:
                raise
            # What the buffer still holds goes there too, so that the exit does not fail on it.
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self.raw.fileno())
            os.close(descriptor)
            log.warning("nothing reads the output any more: the run goes on, see its metrics.jsonl")


def install() -> None:
    """Replaces stdout and stderr, before logging is set up."""
    _open_closed_descriptors()
    sys.stdout, sys.stderr = TerminalStream(sys.stdout), TerminalStream(sys.stderr)  # type: ignore[assignment]


def _open_closed_descriptors() -> None:
    """Opens /dev/null where a descriptor was closed: the next file would get its number, and a library's output."""
    for number, mode in ((0, "r"), (1, "w"), (2, "w")):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number.
            os.open(os.devnull, os.O_RDWR)
        name = ("stdin", "stdout", "stderr")[number]
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def raw_stream(stream: IO[str]) -> IO[str]:
    """Returns the stream under a TerminalStream, for what draws on a terminal with escape sequences of its own."""
    return getattr(stream, "raw", stream) if isinstance(stream, TerminalStream) else stream


@contextmanager
def outlive_readers() -> Iterator[None]:
    """Within it, output whose reader is gone (`| head`, a `tee` that has died, a closed terminal) is discarded."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, TerminalStream)]
    for stream in streams:
        stream.outlives_reader = True
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
            stream.outlives_reader = False
