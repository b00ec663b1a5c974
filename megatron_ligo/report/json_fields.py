"""Reads a JSON record field by field. A missing field is None; a field of the wrong type adds an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ligo.common.errors import ErrorCollector


class JsonRecord:
    """The fields of one record. Errors are added to `errors`; the caller raises them."""

    def __init__(self, path: Path, fields: Any, errors: ErrorCollector):
        self.path = path
        self.errors = errors
        if not isinstance(fields, dict):
            errors.add(f"{path}", "a JSON object", type(fields).__name__)
        self.fields = fields if isinstance(fields, dict) else {}

    def number(self, *keys: str) -> float | None:
        return self._get(keys, (int, float), "a number")

    def count(self, *keys: str) -> int | None:
        return self._get(keys, int, "a whole number")

    def text(self, *keys: str) -> str | None:
        return self._get(keys, str, "text")

    def table(self, *keys: str) -> dict | None:
        return self._get(keys, dict, "a table")

    def numbers(self, *keys: str) -> list[float] | None:
        entries = self._get(keys, list, "a list of numbers")
        if entries is not None and not all(_is_instance(entry, (int, float)) for entry in entries):
            self.errors.add(f"{self.path}: {'.'.join(keys)}", "a list of numbers", repr(entries)[:60])
            return None
        return entries

    def _get(self, keys: tuple[str, ...], types, expected: str) -> Any:
        value: Any = self.fields
        for depth, key in enumerate(keys):
            if not isinstance(value, dict):
                self.errors.add(f"{self.path}: {'.'.join(keys[:depth])}", "a table", repr(value)[:60])
                return None
            value = value.get(key)
            if value is None:
                return None
        if not _is_instance(value, types):
            self.errors.add(f"{self.path}: {'.'.join(keys)}", expected, repr(value)[:60])
            return None
        return value


def _is_instance(value: Any, types) -> bool:
    return isinstance(value, types) and not isinstance(value, bool)


def load_record(path: Path, errors: ErrorCollector) -> JsonRecord | None:
    """Loads a record; None if the file does not exist. Adds an error if the file is not a JSON object."""
    if not path.is_file():
        return None
    try:
        return JsonRecord(path, json.loads(path.read_text(encoding="utf-8")), errors)
    except (ValueError, RecursionError) as error:
        errors.add(f"{path}", "JSON", f"invalid JSON ({error})")
        return None
