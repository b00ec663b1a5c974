"""Models in several GGUF files, NAME-00001-of-00003.gguf: the first states the metadata, each holds some tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_ligo.checkpoint.formats.gguf.header import GgufHeader, read_header
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"


def find_model_file(folder: Path) -> Path | None:
    """Returns the only GGUF model in a folder: its file, or the first of its parts. None if there is none or several.

    Parts count as one model if their names agree; `read_model_header` checks that all are there.
    """
    files = sorted(folder.glob("*.gguf"))
    names = {match.group(1, 3) for match in map(PART.fullmatch, (file.name for file in files)) if match}
    matched = all(PART.fullmatch(file.name) for file in files)
    return files[0] if len(files) == 1 or (files and matched and len(names) == 1) else None


def read_model_header(path: Path) -> GgufHeader:
    """Reads the header of a model's file or, given the first of several, of all of them.

    Raises CheckpointError for a part that is missing, of another model, or not the first.
    """
    header = read_header(path)
    count = header.metadata.get(COUNT, 1)
    if type(count) is int and count in (0, 1):
        return header
    match = PART.fullmatch(path.name)
    if type(count) is not int or not match or int(match[3]) != count:
        expected = f"a name that ends in -00001-of-{count:05d}.gguf" if type(count) is int else f"a number in {COUNT}"
        raise CheckpointError(Problem(f"{path}", expected, describe_value(count if match else path.name)))
    if header.metadata.get(NUMBER) != 0 or int(match[2]) != 1:
        raise CheckpointError(Problem(f"{path}", "the first part of the model", f"part {match[2]}", "Name the first."))
    return _join(path, header, [path.with_name(f"{match[1]}-{n:05d}-of-{match[3]}.gguf") for n in range(1, count + 1)])


def _join(path: Path, first: GgufHeader, parts: Sequence[Path]) -> GgufHeader:
    errors = ErrorCollector(f"{path} and its other parts are not one model", CheckpointError)
    tensors = dict(first.tensors)
    for number, part in enumerate(parts[1:], 1):
        if not part.is_file():
            errors.add(part.name, "a part of the model", "no such file")
            continue
        header = read_header(part)
        stated = (header.metadata.get(NUMBER), header.metadata.get(COUNT))
        if stated != (number, len(parts)):
            errors.add(part.name, f"{NUMBER} {number} and {COUNT} {len(parts)}", describe_value(stated))
        for name in header.tensors.keys() & tensors.keys():
            errors.add(name, "one tensor of that name", f"another in {part.name}")
        tensors |= header.tensors
    total = first.metadata.get(TENSORS, len(tensors))
    if total != len(tensors) and not errors.problems:
        errors.add(TENSORS, len(tensors), describe_value(total))
    errors.raise_if_any()
    return GgufHeader(first.metadata, tensors)
