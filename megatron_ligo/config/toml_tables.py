"""Tables from TOML files and from `--set section.key=value`."""

from __future__ import annotations

import json
import math
import re
import tomllib
from pathlib import Path

from megatron_ligo.common.atomic_files import read_text
from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem

# No key lies deeper. Python's own limit is that of recursion, far above.
MAX_DEPTH = 8
# tomllib takes quadratic time for a key of many parts, of which none has as many.
LONG_KEY = re.compile(rf"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){{{4 * MAX_DEPTH}}}""")
# Of a signed integer of 64 bits, which TOML promises and no key exceeds.
MAX_INTEGER = 2**63 - 1


def read_toml(path: Path) -> dict:
    """Reads a TOML file. Raises ConfigError if it is missing, a folder or not TOML."""
    try:
        return _parse(read_text(path))
    except (FileNotFoundError, IsADirectoryError) as error:
        content = "a folder" if isinstance(error, IsADirectoryError) else "no such file"
        raise ConfigError(Problem(f"config {path}", "a TOML file", content, "Check --config.")) from None
    except (ValueError, RecursionError) as error:
        is_twice = str(error).startswith(("Cannot declare", "Cannot overwrite"))
        hint = "A section or a key is there twice: keep one, with the keys of both." if is_twice else ""
        raise ConfigError(Problem(f"config {path}", "valid TOML", error, hint)) from None


def _parse(text: str) -> dict:
    """Parses TOML in linear time. Raises ValueError, or RecursionError for nested values."""
    if LONG_KEY.search(text):
        raise ValueError("a key of too many parts")
    table = tomllib.loads(text)
    _check_value(table)
    return table


def _check_value(value: object, depth: int = 0) -> None:
    """Raises ValueError if a value is nested deeper than any key's, so that no later recursion fails, or too large."""
    if depth > 4 * MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise ValueError(f"an integer of {value.bit_length()} bits, more than 63")
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for entry in entries:
        _check_value(entry, depth + 1)


def parse_value(text: str) -> object:
    """Returns a TOML value; text that is none stays text."""
    if LONG_KEY.search(text):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def format_value(value: object) -> str:
    """Returns a text, number, truth value or list of such as TOML."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    # As JSON, but for characters that JSON writes as two, and the one control character that it does not escape.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def apply_setting(table: dict, text: str, errors: ErrorCollector) -> None:
    """Sets `section.key=value` in the table. A value that is not valid TOML is taken as text."""
    name, equals, raw = text.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections or not all([*sections, key]):
        errors.add("--set", "section.key=value", repr(text), "Example: --set fit.steps=20.")
        return
    if len(sections) > MAX_DEPTH:
        errors.add("--set", f"a key of at most {MAX_DEPTH} sections", f"{len(sections)} in {name!r}")
        return
    value = parse_value(raw.strip())
    try:
        _check_value(value)
    except ValueError as error:
        errors.add(f"--set {name}", "a value of a key", error)
        return
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            errors.add(f"--set {name}", "a section or a table", repr(table), f"{section!r} already has a plain value.")
            return
    table[key] = value
