"""Reads TOML tables into frozen dataclasses and checks types and limits. Independent of models.

A section is a frozen dataclass. Its fields are sections, or settings made by `setting` with a default, one line of
help and the limits of the value. `read_section` checks keys, types and limits, and collects every error.
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

# Names of the same settings elsewhere: in Hugging Face's configs and Trainer, in Megatron-LM.
OTHER_NAMES = {
    "n_layer": "num_layers",
    "num_hidden_layers": "num_layers",
    "n_embd": "hidden_size",
    "intermediate_size": "ffn_size",
    "ffn_hidden_size": "ffn_size",
    "n_head": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "num_query_groups": "num_kv_heads",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_router_topk": "top_k",
    "shared_expert_intermediate_size": "shared_expert_ffn_size",
    "learning_rate": "lr",
    "max_steps": "steps",
    "train_iters": "steps",
    "per_device_train_batch_size": "micro_batch_size",
    "max_grad_norm": "clip",
    "clip_grad": "clip",
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "expert_model_parallel_size": "ep",
    "context_parallel_size": "cp",
}
TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "a boolean"}


def setting(default: Any, help: str, *, choices: tuple = (), low=None, above=None, high=None, below=None) -> Any:
    """Declares a field of a section.

    low <= value <= high and above < value < below; limits and choices apply to each entry of a list or a table.
    """
    limits = {"choices": choices, "low": low, "above": above, "high": high, "below": below}
    return dataclasses.field(default=default, metadata={"help": help, "limits": limits})


def is_section(field_type: Any) -> bool:
    return dataclasses.is_dataclass(field_type)


@cache
def field_types(section: type) -> dict[str, Any]:
    """Returns the resolved types of a section's settings and sections by name, in declaration order."""
    resolved = typing.get_type_hints(section)
    return {
        field.name: resolved[field.name]
        for field in dataclasses.fields(section)
        if is_section(resolved[field.name]) or "help" in field.metadata
    }


def iterate_settings(section: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Yields (dotted key, field, type) of every setting of a section and of the sections inside it."""
    for name, field_type in field_types(section).items():
        if is_section(field_type):
            yield from iterate_settings(field_type, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", section.__dataclass_fields__[name], field_type


def read_section(section: type, table: dict, errors: ErrorCollector, prefix: str = "", root: type | None = None) -> Any:
    """Builds a section from a table. A bad value is added to `errors` and replaced by its default.

    prefix: dotted path of the section. root: the outermost section, searched for misplaced keys.
    """
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
    """Returns a hint: the sections that have this key, its name here, or the closest key of the same section."""
    known = list(known)
    if OTHER_NAMES.get(name) in known:
        return f"Here it is called {OTHER_NAMES[name]!r}."
    sections = [key.rpartition(".")[0] for key, field, _ in iterate_settings(root) if field.name == name]
    if sections:
        return f"It belongs to {' or '.join(f'[{section}]' for section in sections)}."
    return did_you_mean(name, known)


def _read_value(where: str, value: Any, field_type: Any, field: dataclasses.Field, errors: ErrorCollector) -> Any:
    try:
        coerced = coerce(value, field_type)
    except TypeError:
        errors.add(where, describe_type(field_type), _format_value(value), f"Meaning: {field.metadata['help']}.")
        return field.default
    limits = field.metadata["limits"]
    for entry in _iterate_entries(coerced):
        expected = _describe_violated_limits(entry, limits)
        if expected:
            hint = did_you_mean(entry, limits["choices"]) if limits["choices"] and isinstance(entry, str) else ""
            errors.add(where, expected, _format_value(entry), hint)
            return field.default
    return coerced


def coerce(value: Any, field_type: Any) -> Any:
    """Converts a TOML value to a field's type (integer to float, list to tuple). TypeError if it does not fit."""
    origin = typing.get_origin(field_type)
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(field_type):
            try:
                return coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple:
        return _coerce_tuple(value, typing.get_args(field_type))
    if origin is dict:
        _, entry_type = typing.get_args(field_type)
        if not isinstance(value, dict):
            raise TypeError
        return {str(name): coerce(entry, entry_type) for name, entry in value.items()}
    if field_type is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if field_type is str and "\0" in str(value):
        # No path and no other string setting may contain NUL.
        raise TypeError
    if type(value) is field_type and not (field_type is float and not math.isfinite(value)):
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


def describe_type(field_type: Any) -> str:
    """Returns a field's type in words, for error messages and --help."""
    origin = typing.get_origin(field_type)
    args = typing.get_args(field_type)
    if origin in (types.UnionType, typing.Union):
        # "a number" includes integers.
        hidden = {types.NoneType, *([int] if float in args else [])}
        return " or ".join(describe_type(arg) for arg in args if arg not in hidden)
    if origin is tuple:
        length = "" if args[-1] is Ellipsis else f" of {len(args)}"
        return f"a list{length}, each entry {describe_type(args[0])}"
    if origin is dict:
        return f"a table by name, each entry {describe_type(args[1])}"
    return TYPE_NAMES[field_type]


def _iterate_entries(value: Any) -> Iterator[Any]:
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
    yield from (entry for entry in entries if entry is not None)


def _describe_violated_limits(value: Any, limits: dict) -> str | None:
    """Returns the limits in words if the value violates them. A string among numbers (a data prefix) has none."""
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
    violated = any(limits[name] is not None and not is_met(limits[name]) for name, _, is_met in checks)
    phrases = [f"{phrase} {limits[name]}" for name, phrase, _ in checks if limits[name] is not None]
    return " and ".join(phrases) if violated else None


def _format_value(value: Any) -> str:
    if type(value) is bool:
        return str(value).lower()
    type_names = {**TYPE_NAMES, list: "a list", dict: "a table"}
    text = repr(value)
    text = text if len(text) <= 200 else f"{text[:200]}..."
    return f"{text} ({type_names.get(type(value), type(value).__name__)})"
