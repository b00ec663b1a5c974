"""The keys of a source of sizes (config.json, Megatron's arguments, GGUF metadata, ...): an allow-list for each source.

A key is read into a field of the model's config, or harmless for a stated reason, or fixed: it must have a value under
which the model computes what this program computes. Any other key passes only while its value is empty, or if the user
accepts it by name (`--accept KEY`); the manifest records what was accepted. A fixed key is never accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_ligo.common.errors import ConfigError, ErrorCollector, Problem

MAX_VALUE_CHARS = 80


class AcceptedKeys:
    """The unknown keys that the user accepts by name. `used`: those that a source stated, with their values."""

    def __init__(self, names: Iterable[str] = ()):
        self.names = frozenset(names)
        self.used: dict[str, object] = {}

    def accepts(self, key: str, value: object) -> bool:
        """Returns whether a key may have a value that nobody understands, and remembers that it was used."""
        if key not in self.names:
            return False
        self.used[key] = value
        return True

    def check_used(self, source: object) -> None:
        """Raises ConfigError for every name that the source did not need."""
        errors = ErrorCollector("keys to accept", ConfigError)
        for name in sorted(self.names - set(self.used)):
            errors.add(f"--accept {name}", f"a key that {source} states and that would be refused", "no such key")
        errors.raise_if_any()


NO_KEYS = AcceptedKeys()


@dataclass(frozen=True)
class KeyTable:
    """What each key of one source means.

    fields: key -> field of ModelConfig, or a word for what it is read into. harmless: key -> why it does not change
    what the model computes. fixed: key -> the values under which the model computes what this program computes, none
    if the key itself shows that it does not.
    hints: key -> what to do about a fixed key with another value.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    harmless: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.fields, *self.harmless, *self.fixed]
        twice = {name for name in names if names.count(name) > 1}
        assert not twice, f"classified twice: {sorted(twice)}"

    def __contains__(self, key: str) -> bool:
        return key in self.fields or key in self.harmless or key in self.fixed

    def check(self, stated: Mapping[str, object], accepted: AcceptedKeys, errors: ErrorCollector) -> None:
        """Adds an error for every key whose value may change the model in a way that this program does not know."""
        for key, value in stated.items():
            if key in self.fixed:
                if not any(is_same_value(value, known) for known in self.fixed[key]):
                    expected = " or ".join(map(repr, self.fixed[key])) or "no such key"
                    errors.add(key, expected, describe_value(value), self.hints.get(key, ""))
            elif key not in self and not is_empty(value) and not accepted.accepts(key, value):
                hint = f"If it does not change what the model computes, pass --accept {key}."
                errors.add(key, "a key that this program knows", describe_value(value), hint)


def is_same_value(value: object, known: object) -> bool:
    """Compares two plain values. A boolean equals no number; 1 and 1.0 are the same."""
    if isinstance(value, bool) or isinstance(known, bool):
        return value is known
    if isinstance(value, list | tuple) and isinstance(known, list | tuple):
        return len(value) == len(known) and all(map(is_same_value, value, known))
    return type(value) in (type(known), int, float) and value == known


def is_empty(value: object) -> bool:
    """Returns whether a value switches nothing on: None, false, a zero, "", or an empty list or dict."""
    if value is None or value is False:
        return True
    if isinstance(value, int | float | complex):
        return value == 0
    return isinstance(value, str | bytes | list | tuple | dict | set | frozenset) and not value


def describe_value(value: object) -> str:
    """Returns a value as short text for an error."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}..."


def check_agreement(
    ours: Mapping[str, object], theirs: Mapping[str, object], where: str, beside: str, errors: ErrorCollector
) -> None:
    """Adds an error for each size that two sources of one model state differently.

    ours, theirs: sizes by field of ModelConfig; only fields in both are compared. where, beside: names of the sources.
    """
    for name in ours:
        if name in theirs and not is_same_value(ours[name], theirs[name]):
            hint = "Both describe the same weights: correct the wrong one, or remove it."
            expected = f"{describe_value(theirs[name])}, as {beside} states"
            errors.problems.append(Problem(f"{where}: {name}", expected, describe_value(ours[name]), hint))
