"""Bounded reads and atomic writes of small text and JSON files; the package's only fsync-and-rename code.

A file or folder is built under a temporary name, fsynced, renamed to its final name, and the parent folder is fsynced:
after a crash either the previous content or the new content is there, never a part.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections import Counter
from contextlib import suppress
from math import isinf
from pathlib import Path

# A tokenizer file has about ten million bytes; a much larger file is not one.
MAX_TEXT_BYTES = 1 << 28
# Integers with more digits overflow a float.
MAX_INTEGER_DIGITS = 300


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Reads a regular UTF-8 file of at most `max_bytes`. Raises ValueError for any other, or OSError.

    A pipe or a device is refused, because reading it may never end.
    """
    # An error of `open` names the path; one of `os.fdopen` would name the descriptor.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > max_bytes:
            raise ValueError(f"{status.st_size} bytes, more than the limit of {max_bytes}")
        return file.read().decode("utf-8")


def read_json(path: Path, finite: bool = True) -> object:
    """Reads a JSON file as `parse_json` does. Raises OSError if it cannot be read."""
    return parse_json(read_text(path), finite)


def parse_json(text: str | bytes, finite: bool = True) -> object:
    """Parses JSON with bounded integers and nesting, and no key twice in an object. Raises ValueError.

    Programs differ in which of two values they take for a key that is there twice. finite: refuses numbers that are
    not; the records of a run may hold a loss that is not.
    """
    limits = {"parse_float": _parse_float, "parse_constant": _refuse_constant} if finite else {}
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_int=_parse_integer, **limits)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = sorted(key for key, count in counts.items() if count > 1)
        more = f" and {len(twice) - 1} more keys" if len(twice) > 1 else ""
        raise ValueError(f"the key {twice[0][:200]!r}{more} twice in one object: remove all but one")
    return table


def _parse_float(text: str) -> float:
    number = float(text)
    if isinf(number):
        raise ValueError(f"the number {text[:40]}, which is too large")
    return number


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name}, which is not a number in JSON")


def _parse_integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file atomically."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically. Of several processes that write it at once, one wins with its whole content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_bytes(content)
        publish_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish_file(temporary: Path, target: Path) -> None:
    """Fsyncs a finished file and renames it to its final name in the same folder, replacing what is there."""
    fsync_path(temporary)
    temporary.replace(target)
    fsync_path(target.parent)


def remove_tree(path: Path) -> None:
    """Removes a folder if there is one; of a link, the link alone: what it leads to is somebody else's."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def replace_folder(new: Path, target: Path, backup: Path) -> None:
    """Renames a finished, fsynced folder to its final name. `backup` holds the previous one until the new one is there.

    After a crash in between, `restore_backup` brings the previous folder back.
    """
    if target.exists() or target.is_symlink():
        target.rename(backup)
    new.rename(target)
    fsync_path(target.parent)
    with suppress(OSError):
        remove_tree(backup)


def restore_backup(backup: Path, target: Path) -> None:
    """Undoes or completes an interrupted `replace_folder`: the backup returns only if nothing replaced it."""
    if backup.exists() and not target.exists():
        backup.rename(target)
    with suppress(OSError):
        remove_tree(backup)


def fsync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself, to the disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def fsync_folders(folder: Path) -> None:
    """Flushes the entries of every folder below `folder`, and its own; its files are fsynced already."""
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync_path(path)


def fsync_path(path: Path) -> None:
    """Flushes a file's content, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fsync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def fsync_descriptor(descriptor: int) -> None:
    """Flushes an open file to the disk."""
    os.fsync(descriptor)


def fdatasync_descriptor(descriptor: int) -> None:
    """Flushes an open file's content, but not its times, to the disk."""
    os.fdatasync(descriptor)
