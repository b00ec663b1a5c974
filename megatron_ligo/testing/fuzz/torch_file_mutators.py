"""Samples and mutations of torch.save files: archives that describe a record in two ways, and files of old torch."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

# Offsets of the fields in a record's own header, and in the directory: flags, checksum, sizes, lengths, place.
LOCAL_FIELDS = ((6, "<H"), (8, "<H"), (14, "<I"), (18, "<I"), (22, "<I"), (26, "<H"), (28, "<H"))
DIRECTORY_FIELDS = ((8, "<H"), (10, "<H"), (16, "<I"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I"))
OLD_FILE_EDITS = (
    "left out", "twice", "another's name", "length", "data left out", "more", "no list", "exchanged",
)  # fmt: skip
SAFETENSORS, SINGLE = "model.safetensors", "pytorch_model.bin"


def to_torch_file(folder: Path, is_zip: bool = True) -> None:
    """Replaces a Hugging Face folder's safetensors by a state dict of torch.save."""
    state = load_file(folder / SAFETENSORS)
    torch.save(state, folder / SINGLE, _use_new_zipfile_serialization=is_zip)
    (folder / SAFETENSORS).unlink()


def edit_headers(draw: random.Random, path: Path) -> str | None:
    """Changes a field of a record's header or of its entry in the directory, or lets two entries name one record."""
    with zipfile.ZipFile(path) as archive:
        infos, at = archive.infolist(), archive.start_dir
    content = bytearray(path.read_bytes())
    entries = []
    for _ in infos:
        entries.append(at)
        at += 46 + sum(struct.unpack_from("<3H", content, at + 28))
    number, other = draw.randrange(len(infos)), draw.randrange(len(infos))
    how = draw.choice(("own header", "directory", "one place", "one name", "places exchanged"))
    one, two = entries[number], entries[other]
    if how == "own header":
        _edit_field(draw, content, infos[number].header_offset, LOCAL_FIELDS)
    elif how == "directory":
        _edit_field(draw, content, one, DIRECTORY_FIELDS)
    elif how == "one place":
        content[one + 42 : one + 46] = content[two + 42 : two + 46]
    elif how == "places exchanged":
        content[one + 42 : one + 46], content[two + 42 : two + 46] = (
            content[two + 42 : two + 46],
            content[one + 42 : one + 46],
        )
    else:
        names = [infos[place].filename.encode() for place in (number, other)]
        if len(names[0]) != len(names[1]):
            return None
        for start in (one + 46, infos[number].header_offset + 30):
            content[start : start + len(names[1])] = names[1]
    if content == path.read_bytes():
        return None
    path.write_bytes(content)
    return f"{infos[number].filename}: {how}"


def _edit_field(draw: random.Random, content: bytearray, start: int, fields: tuple) -> None:
    offset, form = draw.choice(fields)
    (value,) = struct.unpack_from(form, content, start + offset)
    largest = 2 ** (8 * struct.calcsize(form)) - 1
    changed = draw.choice(
        (0, 1, value + 1, value - 1, value + 4, value ^ 8, value * 2, largest, draw.randrange(largest))
    )
    struct.pack_into(form, content, start + offset, changed % (largest + 1))


def edit_old_file(draw: random.Random, path: Path) -> str | None:
    """Changes the list of storages, their order or their lengths in a file of torch before 1.6."""
    content = path.read_bytes()
    file = io.BytesIO(content)
    try:
        for _ in range(3):
            pickle.load(file)
        _StorageReader(file).load()
    except (pickle.UnpicklingError, EOFError):
        return None
    end, keys, storages = file.tell(), pickle.load(file), []
    for _ in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        storages.append((numel, file.read(4 * numel)))
    at, to = draw.randrange(len(keys)), draw.randrange(len(keys))
    how = draw.choice(
        ("left out", "twice", "another's name", "length", "data left out", "more", "no list", "exchanged")
    )
    numel, data = storages[at]
    if how == "left out":
        del keys[at], storages[at]
    elif how == "twice":
        keys.insert(to, keys[at])
        storages.insert(to, storages[at])
    elif how == "another's name" and at != to:
        keys[at] = keys[to]
    elif how == "length":
        storages[at] = draw.choice((0, -1, numel + 1, numel - 1, 1 << 62)), data
    elif how == "data left out":
        storages[at] = numel, b""
    elif how == "more":
        keys.append("unknown")
        storages.append((1, bytes(4)))
    elif how == "no list":
        keys = draw.choice((None, 7, {}, [[]], tuple(keys[:-1])))
    else:
        # Both with their names: other places of the same numbers.
        keys[at], keys[to], storages[at], storages[to] = keys[to], keys[at], storages[to], storages[at]
        how = "exchanged with another, name and numbers"
    tail = b"".join(struct.pack("<q", count) + numbers for count, numbers in storages)
    path.write_bytes(content[:end] + pickle.dumps(keys, 2) + tail)
    return f"{path.name}: storage {at} {how}"


class _StorageReader(pickle.Unpickler):
    """Reads past the object of a file that this package's samples wrote."""

    def persistent_load(self, reference: object) -> object:
        return reference

    def find_class(self, module: str, name: str) -> object:
        return OrderedDict if name == "OrderedDict" else lambda *arguments: arguments
