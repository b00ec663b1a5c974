"""The journal of a conversion: one JSON line for each tensor that was read or written completely.

Lines are not fsynced one by one: a resumed run compares the digest in a line with the bytes on the disk.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from threading import Lock


def read_journal(path: Path) -> tuple[dict[tuple[str, ...], object], int]:
    """Returns the entries of a journal's complete lines, and those lines' bytes; {} and 0 for a missing file."""
    entries: dict[tuple[str, ...], object] = {}
    complete_bytes = 0
    if not path.exists():
        return entries, complete_bytes
    with path.open("rb") as file:
        for line in file:
            try:
                key, value = json.loads(line)
                key = tuple(key)
            except (ValueError, TypeError):
                break
            if not line.endswith(b"\n"):
                break
            entries[key] = value
            complete_bytes += len(line)
    return entries, complete_bytes


class Journal:
    """A dict of JSON values, which outlives the process if it has a path.

    Keys are tuples of strings: ("read", key, kind), ("wrote", file, tensor). Thread-safe.
    """

    def __init__(self, path: Path | None = None):
        self.entries: dict[tuple[str, ...], object] = {}
        self._file = None
        self._lock = Lock()
        if path is None:
            return
        self.entries, complete_bytes = read_journal(path)
        self._file = path.open("r+b" if path.exists() else "w+b")
        # Drops a last line that a killed process left incomplete.
        self._file.truncate(complete_bytes)
        self._file.seek(complete_bytes)

    def get(self, *key: str) -> object | None:
        return self.entries.get(key)

    def add(self, *key: str, value: object) -> None:
        line = json.dumps([key, value]).encode() + b"\n"
        with self._lock:
            self.entries[key] = value
            if self._file:
                self._file.write(line)
                self._file.flush()

    def absorb(self, path: Path) -> None:
        """Merges the complete lines of another journal."""
        for key, value in read_journal(path)[0].items():
            self.add(*key, value=value)

    def close(self) -> None:
        if self._file:
            # On a full disk the last line is lost, and its work is repeated.
            with suppress(OSError):
                self._file.close()
            self._file = None
