"""Picks files of a sample, and edits JSON files and safetensors headers."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

# Values that readers tend to mishandle.
HOSTILE_VALUES = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64 + 1, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", "\0", "..",
    "../../outside", "/etc/passwd", "model\n", "\udcff", "9" * 5000, [], {}, [[]], {"": 0}, [1, "a", None],
)  # fmt: skip


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def pick_file(draw: random.Random, folder: Path, *endings: str) -> Path | None:
    paths = [path for path in list_files(folder) if not endings or path.name.endswith(endings)]
    return draw.choice(paths) if paths else None


def _load_json(path: Path) -> tuple[object, Callable[[object], bytes]] | None:
    """Returns a file's JSON (of a safetensors file: its header), and a function that rebuilds the file."""
    content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            (size,) = struct.unpack("<Q", content[:8])
            rest = content[8 + size :]
            return json.loads(content[8 : 8 + size]), lambda text: struct.pack("<Q", len(text)) + text + rest
        return json.loads(content), lambda text: text
    except (ValueError, struct.error):
        return None


def edit_json(draw: random.Random, folder: Path) -> str | None:
    """Changes, deletes or renames one entry of a JSON file or a safetensors header."""
    path = pick_file(draw, folder, ".json", ".safetensors")
    loaded = path and _load_json(path)
    if not loaded:
        return None
    table, rebuild = loaded
    slots = list(list_slots(table))
    if not slots:
        return None
    holder, key = draw.choice(slots)
    how = draw.choice(("value", "value", "value", "gone", "renamed", "deep"))
    if how == "gone":
        del holder[key]
    elif how == "renamed" and isinstance(holder, dict):
        holder[str(draw.choice(HOSTILE_VALUES))] = holder.pop(key)
    elif how == "deep":
        text = json.dumps(table).encode("utf-8", "surrogatepass")
        path.write_bytes(rebuild(b"[" * 20_000 + text))
        return f"{path.name} is nested too deeply"
    else:
        holder[key] = draw.choice(HOSTILE_VALUES)
    path.write_bytes(rebuild(json.dumps(table).encode()))
    return f"{path.name}: {key!r} {how}"


def list_slots(table: object) -> Iterator[tuple[dict | list, object]]:
    """Yields (holder, key) of every value in a JSON value."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield table, key
        yield from list_slots(value)


def double_json_key(draw: random.Random, folder: Path) -> str | None:
    """Writes a key of a JSON object or a safetensors header twice, with two values."""
    path = pick_file(draw, folder, ".json", ".safetensors")
    loaded = path and _load_json(path)
    if not loaded or not isinstance(loaded[0], dict) or not loaded[0]:
        return None
    table, rebuild = loaded
    key = draw.choice(sorted(table))
    value = draw.choice((None, 0, table[draw.choice(sorted(table))]))
    text = json.dumps(table)
    first = f"{{{json.dumps(key)}: {json.dumps(value)}, "
    path.write_bytes(rebuild((first + text[1:]).encode()))
    return f"{path.name}: {key!r} twice"
