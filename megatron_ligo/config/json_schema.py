"""The JSON schema of a run.toml, from the typed settings, for editors that complete and check TOML by one."""

from __future__ import annotations

import types
import typing
from typing import Any

from megatron_ligo.config import typed_toml
from megatron_ligo.config.run_config import RunConfig

DIALECT = "http://json-schema.org/draft-07/schema#"
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
# Our limits by their names in a schema.
LIMITS = {"low": "minimum", "above": "exclusiveMinimum", "high": "maximum", "below": "exclusiveMaximum"}


def build_schema() -> dict[str, Any]:
    """Returns the schema of a run.toml: its sections, keys, types, limits, defaults and help."""
    return {"$schema": DIALECT, "title": "run.toml of megatron_ligo", **_describe_section(RunConfig)}


def _describe_section(section: type) -> dict[str, Any]:
    properties = {}
    for name, field_type in typed_toml.field_types(section).items():
        if typed_toml.is_section(field_type):
            properties[name] = _describe_section(field_type)
            continue
        field = section.__dataclass_fields__[name]
        described = {"description": field.metadata["help"], **_describe_type(field_type, field.metadata["limits"])}
        properties[name] = described if field.default is None else {**described, "default": field.default}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _describe_type(field_type: Any, limits: dict[str, Any]) -> dict[str, Any]:
    """Describes a type; the limits are those of each entry of a list or a table, as when a file is read."""
    origin, args = typing.get_origin(field_type), typing.get_args(field_type)
    if origin in (types.UnionType, typing.Union):
        options = [_describe_type(arg, limits) for arg in args if arg is not types.NoneType]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is tuple:
        length = {} if args[-1] is Ellipsis else {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": _describe_type(args[0], limits), **length}
    if origin is dict:
        return {"type": "object", "additionalProperties": _describe_type(args[1], limits)}
    described: dict[str, Any] = {"type": TYPES[field_type]}
    if limits["choices"]:
        described["enum"] = list(limits["choices"])
    elif field_type in (int, float):
        described |= {schema: limits[name] for name, schema in LIMITS.items() if limits[name] is not None}
    return described
