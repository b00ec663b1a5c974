"""Summarises a checkpoint from its headers: format, sizes, layout, and every tensor's shape and dtype."""

from __future__ import annotations

from math import prod

from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.checkpoint.source_keys import describe_value


def describe(reader: Reader) -> dict:
    """Summarises a checkpoint as plain data (JSON): format, sizes, layout, step, and for each key its shape, dtype and
    the dim that tensor parallelism splits (None: none).
    """
    rows = []
    for key in reader.keys():  # noqa: SIM118 - no dict
        info = reader.info(key)
        dtype = str(info.dtype).removeprefix("torch.")
        rows.append({"key": key, "shape": list(info.shape), "dtype": dtype, "split": reader.param(key).tp_dim})
    return {
        "path": str(reader.path),
        "format": reader.format,
        "dims": reader.model_config.to_json(),
        "layout": dict(reader.layout),
        "step": reader.trained_steps(),
        "moments": reader.has_moments,
        "unread": list(reader.unread),
        "parameters": sum(prod(row["shape"]) for row in rows),
        "bytes": sum(prod(row["shape"]) * reader.info(row["key"]).dtype.itemsize for row in rows),
        "carried": dict(reader.carried),
        "accepted": {key: describe_value(value) for key, value in reader.accepted.items()},
        "rows": rows,
    }


def to_text(summary: dict) -> str:
    """Formats a summary from `describe` as text."""
    sizes = {name: value for name, value in summary["dims"].items() if value not in (None, False, 0)}
    layout = ", ".join(f"{name} {value}" for name, value in summary["layout"].items()) or "one piece"
    # 0 without Adam's state: many formats have no place for a step.
    step = f"step {summary['step']}, " if summary["step"] or summary["moments"] else ""
    state = f"{step}{'with' if summary['moments'] else 'without'} optimizer state"
    lines = [
        f"{summary['path']}: {summary['format']}, {layout}, {state}",
        f"{summary['parameters']:,} parameters, {summary['bytes']:,} bytes",
        "  ".join(f"{name}={value}" for name, value in sizes.items()),
        *(f"not read: {unread}" for unread in summary["unread"]),
        *(f"accepted: {key} = {value}" for key, value in summary["accepted"].items()),
        "",
    ]
    width = max(len(row["key"]) for row in summary["rows"])
    for row in summary["rows"]:
        shape = " x ".join(map(str, row["shape"]))
        cut = "" if row["split"] is None else f"cut along {row['split']}"
        lines.append(f"{row['key']:<{width}}  {row['dtype']:<9} {shape:<16} {cut}".rstrip())
    return "\n".join(lines)
