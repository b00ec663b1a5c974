"""Mutations of a folder of valid files.

A mutation takes a Random and the folder. It returns a description, or None if it found nothing to mutate. The sibling
folder `outside` holds valid files of the same kind with other numbers. A mutation is `silent` if the files may stay
valid with other content (an edited number in a config). After any other mutation, a reader must refuse the files or
return unchanged content.
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

from megatron_ligo.checkpoint.formats.megatron_core.dcp_metadata import METADATA_FILE
from megatron_ligo.checkpoint.io.iteration_folders import TRACKER
from megatron_ligo.testing.fuzz import gguf_mutators, torch_dist_mutators, torch_file_mutators
from megatron_ligo.testing.fuzz.hostile_pickles import hostile_pickles
from megatron_ligo.testing.fuzz.json_mutators import HOSTILE_VALUES, double_json_key, edit_json, list_files, pick_file

Mutate = Callable[[random.Random, Path], str | None]

HOSTILE_LENGTHS = (0, 1, 7, 2**31 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1)
# The first bytes of a file, which describe its structure.
HEADER_BYTES = 2048
MARK, OUTSIDE = "it_ran", "outside"
# Suffixes of tensor files. No link from one may lead out of a checkpoint's folder.
TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".distcp")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Mutation:
    name: str
    apply: Mutate
    silent: bool = False


def truncate(draw: random.Random, folder: Path) -> str | None:
    path = pick_file(draw, folder)
    size = path.stat().st_size
    size_left = draw.choice((0, 1, size // 2, max(size - 1, 0), draw.randrange(size + 1)))
    os.truncate(path, size_left)
    return f"{path.name} truncated to {size_left} of {size} bytes"


def append_bytes(draw: random.Random, folder: Path) -> str | None:
    path = pick_file(draw, folder)
    with path.open("ab") as file:
        file.write(draw.randbytes(draw.choice((1, 7, 4096))))
    return f"{path.name} has extra bytes"


def delete_file(draw: random.Random, folder: Path) -> str | None:
    path = pick_file(draw, folder)
    path.unlink()
    return f"{path.name} is deleted"


def replace_with_non_file(draw: random.Random, folder: Path) -> str | None:
    """Replaces a file with a folder, a pipe or a link to no regular file."""
    path = pick_file(draw, folder)
    path.unlink()
    kind = draw.choice(("a folder", "a pipe", "a link to nothing", "a link to itself", "a link to /dev/zero"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"a link to nothing": "nowhere", "a link to itself": path.name}.get(kind, "/dev/zero"))
    return f"{path.name} is {kind}"


def swap_files(draw: random.Random, folder: Path) -> str | None:
    """Swaps two files of one kind."""
    one = pick_file(draw, folder)
    others = [path for path in list_files(folder) if path.suffix == one.suffix and path != one]
    if not others:
        return None
    other = draw.choice(others)
    if one.read_bytes() == other.read_bytes():
        return None
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{one.name} and {other.relative_to(folder)} are swapped"


def flip_header_bytes(draw: random.Random, folder: Path) -> str | None:
    """Changes bytes of a file's header."""
    path = pick_file(draw, folder)
    content = bytearray(path.read_bytes())
    if not content:
        return None
    for _ in range(draw.choice((1, 1, 2, 16))):
        content[draw.randrange(min(len(content), HEADER_BYTES))] = draw.randrange(256)
    path.write_bytes(content)
    return f"{path.name} has changed header bytes"


def flip_trailer_bytes(draw: random.Random, folder: Path) -> str | None:
    """Changes bytes at the end of a file, where zip archives keep their directory."""
    path = pick_file(draw, folder, *TORCH_SUFFIXES, ".zip")
    if path is None:
        return None
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 2, 8))):
        content[-1 - draw.randrange(min(len(content), HEADER_BYTES))] = draw.randrange(256)
    path.write_bytes(content)
    return f"{path.name} has changed directory bytes"


def corrupt_length(draw: random.Random, folder: Path) -> str | None:
    """Overwrites an 8-byte length in a header."""
    path = pick_file(draw, folder, ".safetensors", ".gguf", ".idx", *TORCH_SUFFIXES, ".distcp", ".model")
    if path is None:
        return None
    content = bytearray(path.read_bytes())
    if len(content) < 9:
        return None
    at = draw.choice((0, 8, 16, draw.randrange(min(len(content) - 8, HEADER_BYTES))))
    struct.pack_into("<Q", content, min(at, len(content) - 8), draw.choice(HOSTILE_LENGTHS))
    path.write_bytes(content)
    return f"{path.name} has a changed length at byte {at}"


def point_outside(draw: random.Random, folder: Path) -> str | None:
    """Points a name or link to a valid file outside the folder."""
    outside = folder.parent / OUTSIDE
    path = pick_file(
        draw,
        folder,
        "index.json",
        "latest",
        "latest_universal",
        "record.json",
        TRACKER,
        METADATA_FILE,
        *TENSOR_SUFFIXES,
    )
    if path is None:
        return None
    target = outside / path.parent.relative_to(folder)
    name = draw.choice((f"{os.path.relpath(target, path.parent)}/", f"{target}/"))
    if path.name.endswith(TENSOR_SUFFIXES):
        path.unlink()
        path.symlink_to(name + path.name)
    elif path.name == METADATA_FILE:
        torch_dist_mutators.point_chunks_outside(draw, path, name)
    elif path.suffix == ".json":
        _list_outside_file(draw, path, target / path.name, name)
    else:
        path.write_text(name + path.read_text())
    return f"{path.name} points to {name}"


def _list_outside_file(draw: random.Random, path: Path, other: Path, name: str) -> None:
    """Lists a file outside the folder in a JSON file, with its own digest and size."""
    table = json.loads(path.read_text())
    names = table.get("weight_map") or table["files"]
    key = draw.choice(sorted(names))
    if isinstance(names[key], str):
        names[key] = name + names[key]
    else:
        del names[key]
        names[name + key] = json.loads(other.read_text())["files"][key]
    path.write_text(json.dumps(table))


def inject_pickle(draw: random.Random, folder: Path) -> str | None:
    """Injects a hostile pickle: as the file, as an archive's pickle, or in front of it."""
    path = pick_file(draw, folder, *TORCH_SUFFIXES, ".metadata", ".distcp")
    if path is None:
        return None
    name, program = draw.choice(sorted(hostile_pickles(folder.parent / MARK).items()))
    if not zipfile.is_zipfile(path) or draw.random() < 0.3:
        path.write_bytes(program)
        return f"{path.name} is a hostile pickle ({name})"
    archive = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(archive, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if info.filename.endswith("data.pkl"):
                content = program if draw.random() < 0.5 else program[:-1] + b"0" + content
            new.writestr(info, content)
    path.write_bytes(archive.getvalue())
    return f"{path.name} holds a hostile pickle ({name})"


def rewrite_archive(draw: random.Random, folder: Path) -> str | None:
    """Rewrites a torch archive with one record compressed, missing, shortened, oversized or named outside."""
    path = pick_file(draw, folder, *TORCH_SUFFIXES)
    if path is None or not zipfile.is_zipfile(path):
        return None
    how = draw.choice(("packed", "gone", "led out", "bomb", "shorter"))
    archive = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(archive, "w") as new:
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
    path.write_bytes(archive.getvalue())
    return f"{path.name}: {chosen.filename} {how}"


def edit_torch_file(draw: random.Random, folder: Path) -> str | None:
    """Lets a torch.save file describe its storages in two ways, or leave some out."""
    path = pick_file(draw, folder, *TORCH_SUFFIXES)
    if path is None:
        return None
    edit = torch_file_mutators.edit_headers if zipfile.is_zipfile(path) else torch_file_mutators.edit_old_file
    return edit(draw, path)


def edit_chunk_metadata(draw: random.Random, folder: Path) -> str | None:
    """Edits the metadata of a distributed checkpoint's tensors and chunks."""
    path = pick_file(draw, folder, METADATA_FILE)
    return path and torch_dist_mutators.edit_metadata(draw, path, HOSTILE_VALUES, HOSTILE_LENGTHS)


def inject_chunk(draw: random.Random, folder: Path) -> str | None:
    """Replaces one chunk's archive in a distributed checkpoint with a hostile pickle."""
    path = pick_file(draw, folder, METADATA_FILE)
    if path is None:
        return None
    name, program = draw.choice(sorted(hostile_pickles(folder.parent / MARK).items()))
    return f"{torch_dist_mutators.inject_archive(draw, path, program)} is a hostile pickle ({name})"


def edit_text(draw: random.Random, folder: Path) -> str | None:
    """Deletes, doubles or changes a line of a TOML file or a tag."""
    path = pick_file(draw, folder, ".toml", "latest", "latest_universal")
    if path is None:
        return None
    lines = path.read_text().splitlines()
    at = draw.randrange(len(lines))
    how = draw.choice(("gone", "twice", "value", "noise"))
    name = lines[at].partition("=")[0]
    lines[at : at + 1] = {
        "gone": [],
        "twice": [lines[at]] * 2,
        "value": [f"{name}= {json.dumps(draw.choice(HOSTILE_VALUES))}"],
        "noise": [lines[at] + draw.randbytes(4).decode("latin-1")],
    }[how]
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")
    return f"{path.name}: line {at + 1} {how}"


def edit_gguf_metadata(draw: random.Random, folder: Path) -> str | None:
    """Gives a key of a GGUF file's metadata another value, of any type."""
    path = pick_file(draw, folder, ".gguf")
    return None if path is None else gguf_mutators.edit_gguf_metadata(draw, path)


MUTATIONS = (
    Mutation("truncated", truncate),
    Mutation("extra bytes", append_bytes),
    Mutation("deleted", delete_file),
    Mutation("not a file", replace_with_non_file),
    Mutation("are swapped", swap_files, silent=True),
    Mutation("header bytes", flip_header_bytes, silent=True),
    Mutation("trailer bytes", flip_trailer_bytes, silent=True),
    Mutation("wrong length", corrupt_length, silent=True),
    Mutation("edited JSON", edit_json, silent=True),
    Mutation("edited JSON", edit_json, silent=True),
    Mutation("points outside", point_outside),
    Mutation("hostile pickle", inject_pickle),
    Mutation("rewritten archive", rewrite_archive),
    Mutation("edited torch file", edit_torch_file),
    Mutation("edited torch file", edit_torch_file),
    Mutation("doubled JSON key", double_json_key),
    Mutation("edited chunk metadata", edit_chunk_metadata, silent=True),
    Mutation("hostile chunk", inject_chunk),
    Mutation("edited text", edit_text, silent=True),
    Mutation("edited GGUF metadata", edit_gguf_metadata, silent=True),
)
