"""A cache of the values used last, bounded in number and in bytes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class RecentValues(Generic[T]):
    """At most `count` values of at most `limit` bytes together. The newest one is kept at any size."""

    def __init__(self, count: int, limit: int):
        self.count, self.limit = count, limit
        self.nbytes = 0
        self._values: dict[Hashable, tuple[T, int]] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> T | None:
        """Returns a value, which counts as the newest from here on; None if it is not kept."""
        if key not in self._values:
            return None
        self._values[key] = self._values.pop(key)
        return self._values[key][0]

    def put(self, key: Hashable, value: T, nbytes: int) -> None:
        """Keeps a new value and drops the oldest ones above the bounds."""
        assert key not in self._values, f"{key} is kept already"
        self._values[key] = value, nbytes
        self.nbytes += nbytes
        while len(self) > 1 and (len(self) > self.count or self.nbytes > self.limit):
            _, dropped = self._values.pop(next(iter(self._values)))
            self.nbytes -= dropped
