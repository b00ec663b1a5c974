"""A JSON record read field by field: what is missing is None, what is of another kind is a fault of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ligo.common.errors import ErrorCollector


class JsonRecord:
    """The fields of one record. Every fault goes to `faults`; the caller raises them."""

    def __init__(self, path: Path, table: Any, errors: ErrorCollector):
        self.path = path
        self.errors = errors
        if not isinstance(table, dict):
            errors.add(f"{path}", "a JSON object", type(table).__name__)
        self.all = table if isinstance(table, dict) else {}

    def number(self, *keys: str) -> float | None:
        return self._get(keys, (int, float), "a number")

    def text(self, *keys: str) -> str | None:
        return self._get(keys, str, "text")

    def table(self, *keys: str) -> dict | None:
        return self._get(keys, dict, "a table")

    def numbers(self, *keys: str) -> list[float] | None:
        found = self._get(keys, list, "a list of numbers")
        if found is not None and not all(_is_instance(entry, (int, float)) for entry in found):
            self.errors.add(f"{self.path}: {'.'.join(keys)}", "a list of numbers", repr(found)[:60])
            return None
        return found

    def _get(self, keys: tuple[str, ...], kinds, expected: str) -> Any:
        value: Any = self.all
        for depth, key in enumerate(keys):
            if not isinstance(value, dict):
                self.errors.add(f"{self.path}: {'.'.join(keys[:depth])}", "a table", repr(value)[:60])
                return None
            value = value.get(key)
            if value is None:
                return None
        if not _is_instance(value, kinds):
            self.errors.add(f"{self.path}: {'.'.join(keys)}", expected, repr(value)[:60])
            return None
        return value


def _is_instance(value: Any, kinds) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def load_record(path: Path, errors: ErrorCollector) -> JsonRecord | None:
    """The record in a file; None where there is no such file. A file that is no JSON object is a fault."""
    if not path.is_file():
        return None
    try:
        return JsonRecord(path, json.loads(path.read_text(encoding="utf-8")), errors)
    except (ValueError, RecursionError) as error:
        errors.add(f"{path}", "JSON", f"a fault in it: {error}")
        return None
