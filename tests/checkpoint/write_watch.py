"""Whether anything in a folder is opened for writing, as the kernel sees it: libraries in C++ included."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# From linux/inotify.h: a file changed, was closed after it had been open for writing, had its mode or times changed,
# came, went or moved.
CHANGES = 0x2 | 0x8 | 0x4 | 0x100 | 0x200 | 0x40 | 0x80
NONBLOCK = os.O_NONBLOCK


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """AssertionError if the body opens a file of a folder for writing, or changes anything in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
            assert libc.inotify_add_watch(descriptor, bytes(place), CHANGES) >= 0, os.strerror(ctypes.get_errno())
        yield
        try:
            seen = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            seen = b""
        assert not seen, f"{folder} was written into: {seen[16:80]!r}"
    finally:
        os.close(descriptor)
