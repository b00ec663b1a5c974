"""Ways to spoil a folder of good files. Each takes a Random and the folder, and says what it did. Beside the folder
stands `outside`, a good one of the same kind that holds other numbers.

None: it found nothing to change. A change is `silent` where the files stay whole and say something else, as who edits a
number in a config does: then they may be read. Every other one must be refused, or must change nothing that is read.
"""

from __future__ import annotations

import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA
from megatron_ligo.checkpoint.io.iteration_folders import TRACKER
from megatron_ligo.testing.fuzz import torch_dist_mutators
from megatron_ligo.testing.fuzz.hostile_pickles import programs

Work = Callable[[random.Random, Path], str | None]

# Numbers and names that readers stumble over.
HOSTILE = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64 + 1, 10**400, -0.0, 1e308, float("nan"), float("inf"), "", "\0", "..",
    "../../outside", "/etc/passwd", "model\n", "\udcff", "9" * 5000, [], {}, [[]], {"": 0}, [1, "a", None],
)  # fmt: skip
LENGTHS = (0, 1, 7, 2**31 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
# Heads of files, where their structure lies.
HEAD = 2048
MARK, OUTSIDE = "it_ran", "outside"
# What is read from a checkpoint's folder, in which no link may lead out of it.
LINKED = (".safetensors", ".pt", ".pth", ".distcp")


@dataclass(frozen=True)
class Change:
    name: str
    work: Work
    silent: bool = False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _pick(draw: random.Random, folder: Path, *endings: str) -> Path | None:
    found = [path for path in _files(folder) if not endings or path.name.endswith(endings)]
    return draw.choice(found) if found else None


def cut_short(draw: random.Random, folder: Path) -> str | None:
    path = _pick(draw, folder)
    size = path.stat().st_size
    kept = draw.choice((0, 1, size // 2, max(size - 1, 0), draw.randrange(size + 1)))
    os.truncate(path, kept)
    return f"{path.name} cut to {kept} of {size} bytes"


def made_longer(draw: random.Random, folder: Path) -> str | None:
    path = _pick(draw, folder)
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 7, 4096))))
    return f"{path.name} has bytes added"


def missing(draw: random.Random, folder: Path) -> str | None:
    path = _pick(draw, folder)
    path.unlink()
    return f"{path.name} is gone"


def no_file(draw: random.Random, folder: Path) -> str | None:
    """Something else stands where a file should."""
    path = _pick(draw, folder)
    path.unlink()
    kind = draw.choice(("a folder", "a pipe", "a link to nothing", "a link to itself", "a link to /dev/zero"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"a link to nothing": "nowhere", "a link to itself": path.name}.get(kind, "/dev/zero"))
    return f"{path.name} is {kind}"


def exchanged(draw: random.Random, folder: Path) -> str | None:
    """Two files of one kind change places."""
    one = _pick(draw, folder)
    others = [path for path in _files(folder) if path.suffix == one.suffix and path != one]
    if not others:
        return None
    other = draw.choice(others)
    if one.read_bytes() == other.read_bytes():
        return None
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.name} and {other.relative_to(folder)} changed places"


def noise(draw: random.Random, folder: Path) -> str | None:
    """Some bytes in the head of a file."""
    path = _pick(draw, folder)
    content = bytearray(path.read_bytes())
    if not content:
        return None
    for _ in range(draw.choice((1, 1, 2, 16))):
        content[draw.randrange(min(len(content), HEAD))] = draw.randrange(256)
    path.write_bytes(content)
    return f"{path.name} has other bytes in its head"


def noise_at_the_end(draw: random.Random, folder: Path) -> str | None:
    """Where zip archives keep their directory."""
    path = _pick(draw, folder, ".pt", ".pth", ".zip")
    if path is None:
        return None
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 2, 8))):
        content[-1 - draw.randrange(min(len(content), HEAD))] = draw.randrange(256)
    path.write_bytes(content)
    return f"{path.name} has other bytes in its directory"


def lying_length(draw: random.Random, folder: Path) -> str | None:
    """An 8-byte number in a head says more than there is."""
    path = _pick(draw, folder, ".safetensors", ".gguf", ".idx", ".pt", ".pth", ".distcp", ".model")
    if path is None:
        return None
    content = bytearray(path.read_bytes())
    if len(content) < 9:
        return None
    at = draw.choice((0, 8, 16, draw.randrange(min(len(content) - 8, HEAD))))
    struct.pack_into("<Q", content, min(at, len(content) - 8), draw.choice(LENGTHS))
    path.write_bytes(content)
    return f"{path.name} has another length at byte {at}"


def _tables(path: Path) -> tuple[object, Callable[[object], bytes]] | None:
    """The JSON of a file (of a safetensors file's head), and how to put another in its place."""
    content = path.read_bytes()
    try:
        if path.suffix == ".safetensors":
            (size,) = struct.unpack("<Q", content[:8])
            rest = content[8 + size :]
            return json.loads(content[8 : 8 + size]), lambda text: struct.pack("<Q", len(text)) + text + rest
        return json.loads(content), lambda text: text
    except (ValueError, struct.error):
        return None


def edited(draw: random.Random, folder: Path) -> str | None:
    """One place in a JSON file, or in a safetensors file's head, has another value, or is gone, or is there twice."""
    path = _pick(draw, folder, ".json", ".safetensors")
    found = path and _tables(path)
    if not found:
        return None
    table, put = found
    places = list(_places(table))
    if not places:
        return None
    holder, key = draw.choice(places)
    how = draw.choice(("value", "value", "value", "gone", "renamed", "deep"))
    if how == "gone":
        del holder[key]
    elif how == "renamed" and isinstance(holder, dict):
        holder[str(draw.choice(HOSTILE))] = holder.pop(key)
    elif how == "deep":
        text = json.dumps(table).encode("utf-8", "surrogatepass")
        path.write_bytes(put(b"[" * 20_000 + text))
        return f"{path.name} is nested without end"
    else:
        holder[key] = draw.choice(HOSTILE)
    path.write_bytes(put(json.dumps(table).encode()))
    return f"{path.name}: {key!r} {how}"


def _places(table: object):
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield table, key
        yield from _places(value)


def led_out(draw: random.Random, folder: Path) -> str | None:
    """A name that leads out of the folder, to a whole file that stands there and holds other numbers."""
    outside = folder.parent / OUTSIDE
    path = _pick(draw, folder, "index.json", "latest", "latest_universal", "record.json", TRACKER, METADATA, *LINKED)
    if path is None:
        return None
    place = outside / path.parent.relative_to(folder)
    name = draw.choice((f"{os.path.relpath(place, path.parent)}/", f"{place}/"))
    if path.name.endswith(LINKED):
        path.unlink()
        path.symlink_to(name + path.name)
    elif path.name == METADATA:
        torch_dist_mutators.led_out(draw, path, name)
    elif path.suffix == ".json":
        _list_elsewhere(draw, path, place / path.name, name)
    else:
        path.write_text(name + path.read_text())
    return f"{path.name} leads to {name}"


def _list_elsewhere(draw: random.Random, path: Path, other: Path, name: str) -> None:
    """One of the files that a JSON file lists is the one outside, with all that is said of it there."""
    table = json.loads(path.read_text())
    names = table.get("weight_map") or table["files"]
    key = draw.choice(sorted(names))
    if isinstance(names[key], str):
        names[key] = name + names[key]
    else:
        del names[key]
        names[name + key] = json.loads(other.read_text())["files"][key]
    path.write_text(json.dumps(table))


def hostile_pickle(draw: random.Random, folder: Path) -> str | None:
    """A file that holds a pickle runs a program when it is read freely: as the archive's, bare, or before its own."""
    path = _pick(draw, folder, ".pt", ".pth", ".metadata", ".distcp")
    if path is None:
        return None
    name, program = draw.choice(sorted(programs(folder.parent / MARK).items()))
    if not zipfile.is_zipfile(path) or draw.random() < 0.3:
        path.write_bytes(program)
        return f"{path.name} is a pickle that calls ({name})"
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                content = program if draw.random() < 0.5 else program[:-1] + b"0" + content
            new.writestr(info, content)
    path.write_bytes(made.getvalue())
    return f"{path.name} holds a pickle that calls ({name})"


def rewritten_archive(draw: random.Random, folder: Path) -> str | None:
    """A torch archive whose records are packed, doubled, gone, or named so as to lie elsewhere."""
    path = _pick(draw, folder, ".pt", ".pth")
    if path is None or not zipfile.is_zipfile(path):
        return None
    how = draw.choice(("packed", "gone", "led out", "bomb", "shorter"))
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        records = old.infolist()
        chosen = draw.choice(records)
        for info in records:
            content = old.read(info)
            if info is not chosen:
                new.writestr(info, content)
            elif how == "packed":
                new.writestr(info.filename, content, zipfile.ZIP_DEFLATED)
            elif how == "shorter":
                new.writestr(info.filename, content[: len(content) // 2])
            elif how == "led out":
                new.writestr("../" * 6 + info.filename, content)
            elif how == "bomb":
                new.writestr(info.filename, bytes(1 << 26), zipfile.ZIP_DEFLATED)
    path.write_bytes(made.getvalue())
    return f"{path.name}: {chosen.filename} {how}"


def edited_chunks(draw: random.Random, folder: Path) -> str | None:
    """What a distributed checkpoint says of its tensors and their places has another value, or is gone."""
    path = _pick(draw, folder, METADATA)
    return path and torch_dist_mutators.edited(draw, path, HOSTILE, LENGTHS)


def hostile_chunk(draw: random.Random, folder: Path) -> str | None:
    """One of the archives in a distributed checkpoint's files is a program."""
    path = _pick(draw, folder, METADATA)
    if path is None:
        return None
    name, program = draw.choice(sorted(programs(folder.parent / MARK).items()))
    return f"{torch_dist_mutators.hostile(draw, path, program)} calls ({name})"


def edited_text(draw: random.Random, folder: Path) -> str | None:
    """A line of a TOML file or a tag is gone, doubled, or says something else."""
    path = _pick(draw, folder, ".toml", "latest", "latest_universal")
    if path is None:
        return None
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    how = draw.choice(("gone", "twice", "value", "noise"))
    name = lines[at].partition("=")[0]
    lines[at : at + 1] = {
        "gone": [],
        "twice": [lines[at]] * 2,
        "value": [f"{name}= {json.dumps(draw.choice(HOSTILE))}"],
        "noise": [lines[at] + draw.randbytes(4).decode("latin-1")],
    }[how]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    return f"{path.name}: line {at + 1} {how}"


CHANGES = (
    Change("cut short", cut_short),
    Change("made longer", made_longer),
    Change("missing", missing),
    Change("no file", no_file),
    Change("changed places", exchanged, silent=True),
    Change("noise", noise, silent=True),
    Change("noise at the end", noise_at_the_end, silent=True),
    Change("lying length", lying_length, silent=True),
    Change("edited table", edited, silent=True),
    Change("edited table", edited, silent=True),
    Change("led out", led_out),
    Change("hostile pickle", hostile_pickle),
    Change("archive", rewritten_archive),
    Change("edited chunks", edited_chunks, silent=True),
    Change("hostile chunk", hostile_chunk),
    Change("edited text", edited_text, silent=True),
)
