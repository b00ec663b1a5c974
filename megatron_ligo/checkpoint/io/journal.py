"""What an interrupted conversion had done: one JSON line for each thing that is whole.

Lines are not fsynced one by one: whoever goes on compares the digest in the line with the bytes on the disk.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from threading import Lock


def read_journal(path: Path) -> tuple[dict[tuple[str, ...], object], int]:
    """The whole lines of a journal, and their length in bytes; nothing of a file that is not there."""
    entries: dict[tuple[str, ...], object] = {}
    whole = 0
    if not path.exists():
        return entries, whole
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
            whole += len(line)
    return entries, whole


class Journal:
    """A dict of JSON values that survives the process; without a path, one that does not.

    A key is a few words: ("read", key, kind), ("wrote", file, part). Safe to use from several threads.
    """

    def __init__(self, path: Path | None = None):
        self.entries: dict[tuple[str, ...], object] = {}
        self._file = None
        self._lock = Lock()
        if path is None:
            return
        self.entries, whole = read_journal(path)
        self._file = path.open("r+b" if path.exists() else "w+b")
        # A line that was cut off by the end of the process is not one.
        self._file.truncate(whole)
        self._file.seek(whole)

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
        """Takes over the whole lines of another journal."""
        for key, value in read_journal(path)[0].items():
            self.add(*key, value=value)

    def close(self) -> None:
        if self._file:
            # On a full disk its last line is lost: that work will be done again.
            with suppress(OSError):
                self._file.close()
            self._file = None
