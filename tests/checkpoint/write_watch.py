"""Detects that anything in a folder is opened for writing, through the kernel: C++ libraries included."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# From linux/inotify.h: modified, closed after writing, attributes changed, created, deleted, moved.
CHANGES = 0x2 | 0x8 | 0x4 | 0x100 | 0x200 | 0x40 | 0x80
NONBLOCK = os.O_NONBLOCK


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Raises AssertionError if the body opens a file of a folder for writing, or changes anything in it."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(NONBLOCK)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    try:
        for path in [folder, *(sub for sub in folder.rglob("*") if sub.is_dir())]:
            assert libc.inotify_add_watch(descriptor, bytes(path), CHANGES) >= 0, os.strerror(ctypes.get_errno())
        yield
        try:
            events = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            events = b""
        assert not events, f"{folder} was written into: {events[16:80]!r}"
    finally:
        os.close(descriptor)
