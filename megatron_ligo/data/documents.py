"""Documents out of files, folders, and Python's own standard library; in an order that depends on nothing else."""

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
# Folders of the standard library that are no part of it, or only test it.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class DocumentSource:
    """Documents that can be read again and again. max_bytes: the first document past it is not read; 0: all.

    files: what the user named (.txt, .md and .py are one document each, a .jsonl one for each line, under json_key).
    python_docs: the standard library's sources with the documentation in them, and the built-in modules' own.
    """

    files: tuple[Path, ...]
    python_docs: bool = False
    json_key: str = "text"
    max_bytes: int = 0

    def __iter__(self) -> Iterator[str]:
        read = 0
        for text in self._read_all():
            read += len(text.encode())
            if self.max_bytes and read > self.max_bytes:
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
        """About how many bytes there are to read, for a progress bar."""
        paths = [*self.files, *(_list_standard_library() if self.python_docs else [])]
        total = sum(path.stat().st_size for path in paths)
        return min(total, self.max_bytes) if self.max_bytes else total

    def fingerprint(self) -> list:
        """What the documents are made from, to tell whether they changed: names, sizes, times; Python's version."""
        files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]
        return [files, sys.version if self.python_docs else "", self.json_key, self.max_bytes]


def find_text_files(paths: Sequence[str]) -> tuple[Path, ...]:
    """The files that are named or lie in the folders that are named, sorted within a folder."""
    errors = ErrorCollector("texts", DataError)
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            if not inside:
                errors.add(name, f"a folder with files {', '.join(SUFFIXES)}", "none of them")
            found += inside
        elif not path.is_file():
            errors.add(name, "a file or a folder", "neither", "Check the path.")
        elif path.suffix not in SUFFIXES:
            errors.add(name, f"one of {', '.join(SUFFIXES)}", path.suffix or "no suffix")
        else:
            found.append(path)
    errors.raise_if_any()
    return tuple(found)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(Problem(str(path), "UTF-8 text", error, "Convert it, or leave it out.")) from None


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    """A document a line; every faulty line is in the error that ends the file."""
    errors = ErrorCollector(f"{path}", DataError)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[key]
            except (ValueError, KeyError, TypeError) as error:
                text = f"{type(error).__name__}: {error}"
                errors.add(f"line {number}", f"an object with text under {key!r}", text)
                continue
            if isinstance(text, str):
                yield text
            else:
                errors.add(f"line {number}", f"text under {key!r}", type(text).__name__)
    errors.raise_if_any()


def _list_standard_library() -> list[Path]:
    """Its sources, tests left out, in the order of their names' digests: a part of them is a fair sample."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not EXCLUDED_FOLDERS & set(path.relative_to(root).parts[:-1])
    ]
    return [root / name for name in sorted(names, key=lambda name: (xxhash.xxh3_64_intdigest(name.encode()), name))]


def _read_builtin_docs() -> Iterator[str]:
    """One document for each public module that is compiled into the interpreter."""
    for name in sorted(sys.builtin_module_names):
        if name.startswith("_"):
            continue
        module = __import__(name)
        parts = [f"{name}\n\n{module.__doc__ or ''}"]
        for member in sorted(set(dir(module)) - {"__doc__"}):
            thing = getattr(module, member)
            # A plain value's documentation is its type's.
            if (callable(thing) or isinstance(thing, type)) and isinstance(thing.__doc__, str):
                parts.append(f"{name}.{member}\n\n{thing.__doc__}")
        yield "\n\n".join(parts)
