"""Small files of text and JSON: read without trust, written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

# A tokenizer's file has some ten million bytes; a longer one is something else.
LONGEST = 1 << 28
# What has no more is a float as well.
MOST_DIGITS = 300


def read_text(path: Path) -> str:
    """UTF-8. ValueError for what is no such text; a pipe or a device, which might never end, is none. OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        about = os.fstat(handle)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("no regular file")
        if about.st_size > LONGEST:
            raise ValueError(f"{about.st_size} bytes, more than such a file has")
        return file.read().decode("utf-8")


def read_json(path: Path, look: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    """ValueError for what is no JSON; OSError."""
    return parse_json(read_text(path), look)


def parse_json(text: str | bytes, look: Callable[[list[tuple[str, object]]], object] | None = None) -> object:
    """look: given each object's pairs, in order, instead of a dict."""
    try:
        return json.loads(text, object_pairs_hook=look, parse_int=_whole)
    except RecursionError:
        raise ValueError("brackets without end") from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def write_json(path: Path, value: object) -> None:
    """Writes aside, fsyncs, renames."""
    write_text(path, (json.dumps(value, indent=2) + "\n").encode())


def write_text(path: Path, content: bytes) -> None:
    """The file holds this, or what it held, whatever happens; of several that write it at once, one's whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
