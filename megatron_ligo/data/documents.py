"""Text documents from files, folders and Python's standard library, in a deterministic order."""

from __future__ import annotations

import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from megatron_ligo.common.errors import DataError, ErrorCollector, Problem

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Folders below the standard library that are not part of it, or hold its tests.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class DocumentSource:
    """A re-iterable sequence of documents.

    files: a .txt, .md or .py file is one document; each line of a .jsonl file is one, under `json_key`.
    python_docs: adds the standard library's sources and the docstrings of its built-in modules.
    max_bytes: stops before the document that would exceed this total; 0: no limit.
    """

    files: tuple[Path, ...]
    python_docs: bool = False
    json_key: str = "text"
    max_bytes: int = 0

    def __iter__(self) -> Iterator[str]:
        total = 0
        for text in self._read_all():
            total += len(text.encode())
            if self.max_bytes and total > self.max_bytes:
                return
            yield text

    def _read_all(self) -> Iterator[str]:
        for path in self.files:
            yield from _read_jsonl(path, self.json_key) if path.suffix == ".jsonl" else [_read_text(path)]
        if self.python_docs:
            for path in _list_standard_library():
                with tokenize.open(path) as stream:
                    yield stream.read()
            yield from _read_builtin_docs()

    def total_bytes(self) -> int:
        """Estimates the bytes to read, for a progress bar."""
        paths = [*self.files, *(_list_standard_library() if self.python_docs else [])]
        total = sum(path.stat().st_size for path in paths)
        return min(total, self.max_bytes) if self.max_bytes else total

    def fingerprint(self) -> list:
        """Returns an identity of the unread documents: paths, sizes, modification times and Python's version."""
        files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]
        return [files, sys.version if self.python_docs else "", self.json_key, self.max_bytes]


def find_text_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """Lists the text files at `paths`; a folder is searched recursively and sorted. DataError with every bad path."""
    errors = ErrorCollector("texts", DataError)
    files: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            children = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not children:
                errors.add(name, f"a folder with {', '.join(SUFFIXES)} files", "none")
            files += children
        elif not path.is_file():
            errors.add(name, "a file or a folder", "neither", "Check the path.")
        elif path.suffix not in SUFFIXES:
            errors.add(name, f"one of {', '.join(SUFFIXES)}", path.suffix or "no suffix")
        else:
            files.append(path)
    errors.raise_if_any()
    return tuple(files)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), "UTF-8 text", error, "Convert or remove the file.")) from None


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    """Yields one document per line. At the end of the file, raises DataError with every invalid line."""
    errors = ErrorCollector(f"{path}", DataError)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                errors.add(
                    f"line {number}", f"an object with a string under {key!r}", f"{type(error).__name__}: {error}"
                )
                continue
            if isinstance(text, str):
                yield text
            else:
                errors.add(f"line {number}", f"a string under {key!r}", type(text).__name__)
    errors.raise_if_any()


def _list_standard_library() -> list[Path]:
    """Lists the standard library's sources without its tests, ordered by a hash: any prefix is a random sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not EXCLUDED_FOLDERS & set(path.relative_to(root).parts[:-1])
    ]
    return [root / name for name in sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))]


def _read_builtin_docs() -> Iterator[str]:
    """Yields the docstrings of each public module that is compiled into the interpreter, one document per module."""
    for name in sorted(sys.builtin_module_names):
        if name.startswith("_"):
            continue
        module = __import__(name)
        docstrings = [f"{name}\n\n{module.__doc__ or ''}"]
        for member_name in sorted(set(dir(module)) - {"__doc__"}):
            member = getattr(module, member_name)
            # A plain value only has the docstring of its type.
            if (callable(member) or isinstance(member, type)) and isinstance(member.__doc__, str):
                docstrings.append(f"{name}.{member_name}\n\n{member.__doc__}")
        yield "\n\n".join(docstrings)
