"""Typed reading of a config's tables into frozen dataclasses: the mechanism, without one word about models.

A section is a frozen dataclass whose fields are made by `setting` (a default, one line of help, the limits of the
value) or are sections themselves. `read` checks names, types and limits and gathers every fault.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from megatron_ligo.common.errors import ErrorCollector, did_you_mean


def setting(default: Any, help: str, *, choices: tuple = (), low=None, above=None, high=None, below=None) -> Any:
    """A field of a section. `low <= value <= high`, `above < value < below`; limits hold for each entry of a list."""
    limits = {"choices": choices, "low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


def is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


@cache
def field_types(section: type) -> dict[str, Any]:
    """The types of a section's fields by name, in the order in which they were declared."""
    resolved = typing.get_type_hints(section)
    return {field.name: resolved[field.name] for field in dataclasses.fields(section)}


def iterate_settings(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted key, field, type) of every setting of a section, those of its inner sections included."""
    for field in dataclasses.fields(section):
        hint = field_types(section)[field.name]
        if is_section(hint):
            yield from iterate_settings(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, hint


def read_section(section: type, table: dict, errors: ErrorCollector, prefix: str = "", root: type | None = None) -> Any:
    """A section from a table of plain values; a faulty value is reported and its default taken in its place."""
    root = root or section
    values = {}
    known = field_types(section)
    for name, value in table.items():
        where = f"{prefix}{name}"
        if name not in known:
            errors.add(
                where, "a known key" if prefix else "a known section", repr(name), _suggest_key(root, name, known)
            )
        elif is_section(known[name]):
            if isinstance(value, dict):
                values[name] = read_section(known[name], value, errors, f"{where}.", root)
            else:
                errors.add(where, "a section", _format_value(value), f"Write its keys under [{where}].")
        else:
            field = section.__dataclass_fields__[name]
            values[name] = _read_value(where, value, known[name], field, errors)
    return section(**values)


def _suggest_key(root: type, name: str, known: Iterable[str]) -> str:
    """The nearest key of the same section, or else the sections that have a key of this very name."""
    homes = [key.rpartition(".")[0] for key, field, _ in iterate_settings(root) if field.name == name]
    if homes:
        return f"It is a key of {' and '.join(f'[{home}]' for home in homes)}."
    return did_you_mean(name, known)


def _read_value(where: str, value: Any, hint: Any, field: dataclasses.Field, errors: ErrorCollector) -> Any:
    try:
        fitted = coerce(value, hint)
    except TypeError:
        errors.add(where, describe_type(hint), _format_value(value), f"It is: {field.metadata['help']}.")
        return field.default
    limits = field.metadata["limits"]
    for leaf in _iterate_entries(fitted):
        expected = _broken_limit(leaf, limits)
        if expected:
            do = did_you_mean(leaf, limits["choices"]) if limits["choices"] and isinstance(leaf, str) else ""
            errors.add(where, expected, _format_value(leaf), do)
            return field.default
    return fitted


def coerce(value: Any, hint: Any) -> Any:
    """The value as the type asks: a whole number where a number is asked, a list as a tuple; TypeError otherwise."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            try:
                return coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple:
        return _coerce_tuple(value, typing.get_args(hint))
    if origin is dict:
        _, of_value = typing.get_args(hint)
        if not isinstance(value, dict):
            raise TypeError
        return {str(name): coerce(entry, of_value) for name, entry in value.items()}
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is str and "\0" in str(value):
        # No name of a file, and nothing else that a key takes.
        raise TypeError
    if type(value) is hint and not (hint is float and not math.isfinite(value)):
        return value
    raise TypeError


def _coerce_tuple(value: Any, args: tuple) -> tuple:
    if not isinstance(value, list | tuple):
        raise TypeError
    if args[-1] is Ellipsis:
        return tuple(coerce(entry, args[0]) for entry in value)
    if len(value) != len(args):
        raise TypeError
    return tuple(coerce(entry, arg) for entry, arg in zip(value, args, strict=True))


def describe_type(hint: Any) -> str:
    """The type in words, for messages and for --help."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        # Every whole number is a number.
        hidden = {types.NoneType, *([int] if float in args else [])}
        return " or ".join(describe_type(arg) for arg in args if arg not in hidden)
    if origin is tuple:
        return (
            f"a list, each {describe_type(args[0])},"
            if args[-1] is Ellipsis
            else f"a list of {len(args)}, each {describe_type(args[0])}"
        )
    if origin is dict:
        return f"a table of {describe_type(args[1])} by name"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]


def _iterate_entries(value: Any) -> Iterator[Any]:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
    yield from (entry for entry in entries if entry is not None)


def _broken_limit(value: Any, limits: dict) -> str | None:
    """What the limits ask for, if the value breaks them. Text among numbers (a data prefix) has no limits."""
    if limits["choices"]:
        return None if value in limits["choices"] else f"one of {', '.join(map(str, limits['choices']))}"
    if isinstance(value, str | bool):
        return None
    checks = (
        ("low", "at least", lambda limit: value >= limit),
        ("above", "more than", lambda limit: value > limit),
        ("high", "at most", lambda limit: value <= limit),
        ("below", "less than", lambda limit: value < limit),
    )
    broken = any(limits[name] is not None and not holds(limits[name]) for name, _, holds in checks)
    words = [f"{word} {limits[name]}" for name, word, _ in checks if limits[name] is not None]
    return " and ".join(words) if broken else None


def _format_value(value: Any) -> str:
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    if type(value) is bool:
        return str(value).lower()
    return f"{value!r} ({kind.get(type(value), 'a table' if isinstance(value, dict) else type(value).__name__)})"
