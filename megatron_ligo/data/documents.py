"""Text documents from files and Python's standard library, in a deterministic order and a bounded memory."""

from __future__ import annotations

import logging
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path

import xxhash

from megatron_ligo.common.errors import MAX_SHOWN, DataError, ErrorCollector, Problem
from megatron_ligo.data.corpus.plain_text import AUTO, Separator, plan_cuts
from megatron_ligo.data.corpus.raw_chunks import CHUNK_BYTES, RawChunk, parse_chunk
from megatron_ligo.data.corpus.text_files import PLAIN_SUFFIXES, read_file, text_suffix

log = logging.getLogger(__name__)

# Folders below the standard library that are not part of it, or hold its tests.
EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
BAD_LINE_CHOICES = ("fail", "skip")
# After the first bad line of a file, the rest of it is searched for more, up to this size.
MAX_SEARCHED_BYTES = 256 << 20
MAX_LOGGED_BAD_LINES = 10


@dataclass(frozen=True)
class DocumentSource:
    """A re-iterable sequence of documents.

    files: see `corpus.text_files` for the kinds. A plain text file is one document, unless `cuts` names its separator.
    python_docs: adds the standard library's sources and the docstrings of its built-in modules.
    json_key: key of the text in a JSON object, or a table's column.
    max_bytes: stops before the document that would exceed this total; 0: no limit.
    separator: how plain text files are cut, an option of `corpus.plain_text.plan_cuts`.
    on_bad_line: what a record without a usable text is: an error ("fail"), or left out ("skip").
    notes: what the search for the files had to say.
    """

    files: tuple[Path, ...]
    python_docs: bool = False
    json_key: str = "text"
    max_bytes: int = 0
    separator: str = AUTO
    on_bad_line: str = "fail"
    notes: tuple[str, ...] = ()
    cuts: Mapping[Path, Separator] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        """Yields the documents. DataError for a damaged file, and for bad lines unless they are skipped."""
        total = 0
        bad_lines = BadLines(self, silent=True)
        chunks = self.read_chunks()
        for chunk in chunks:
            parsed = parse_chunk(chunk, self.json_key)
            bad_lines.add(chunk.path, parsed.problems, chunks)
            for text, data in zip(parsed.texts, parsed.encoded, strict=True):
                total += len(data)
                if self.max_bytes and total > self.max_bytes:
                    return
                yield text

    def read_chunks(self) -> Iterator[RawChunk]:
        """Yields all documents, undecoded and without the limit, in chunks that workers parse."""
        for path in self.files:
            yield from read_file(path, self.json_key, self.cuts.get(path))
        if self.python_docs:
            yield from _read_python_docs()

    def cut(self, end_token: str, usual_end_tokens: Sequence[str], held_out: bool) -> DocumentSource:
        """Returns this source with its text files cut as `separator` says. held_out: it is to be split in two."""
        plain_files = [path for path in self.files if text_suffix(path) in PLAIN_SUFFIXES]
        lone = held_out and len(self.files) == 1 and not self.python_docs
        return replace(self, cuts=plan_cuts(plain_files, self.separator, end_token, usual_end_tokens, lone))

    def total_bytes(self) -> int:
        """Estimates the bytes to read, for a progress bar."""
        paths = [*self.files, *(_list_standard_library() if self.python_docs else [])]
        total = sum(path.stat().st_size for path in paths)
        return min(total, self.max_bytes) if self.max_bytes else total

    def fingerprint(self) -> list:
        """Returns an identity of the unread documents: paths, sizes, modification times, options, Python's version."""
        files = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in self.files]
        python = sys.version if self.python_docs else ""
        return [files, python, self.json_key, self.max_bytes, self.separator, self.on_bad_line]


class BadLines:
    """Refuses the bad lines of a source, or counts and logs them. counts: those skipped, by file."""

    def __init__(self, texts: DocumentSource, silent: bool = False):
        self.skips = texts.on_bad_line == "skip"
        self.json_key = texts.json_key
        self.silent = silent
        self.counts: Counter[str] = Counter()

    def add(self, path: str, problems: Sequence[Problem], rest: Iterator[RawChunk]) -> None:
        """Takes the problems of a file's chunk. DataError with those and the ones in the rest of the file, or counts.

        rest: the chunks that follow.
        """
        if not problems:
            return
        if not self.skips:
            self._fail(path, problems, rest)
        for problem in problems if not self.silent else ():
            if self.counts.total() < MAX_LOGGED_BAD_LINES:
                log.warning("skipped: %s", problem if problem.where == path else f"{path}, {problem}")
            self.counts[path] += 1

    def _fail(self, path: str, problems: Sequence[Problem], rest: Iterator[RawChunk]) -> None:
        errors = ErrorCollector(path, DataError)
        first, *others = problems
        errors.add(first.where, first.expected, first.found, "--on-bad-line skip leaves such lines out.")
        errors.problems += others
        searched = 0
        try:
            for chunk in rest:
                if chunk.path != path or len(errors.problems) > MAX_SHOWN or searched > MAX_SEARCHED_BYTES:
                    break
                searched += chunk.size
                errors.problems += parse_chunk(chunk, self.json_key).problems
        except DataError as error:
            errors.add_message(str(error))
        errors.raise_if_any()


def _read_python_docs() -> Iterator[RawChunk]:
    """Yields the standard library's sources, and the docstrings of its built-in modules."""
    position = 0
    pending: list[bytes] = []
    for text in chain(_read_library_sources(), _read_builtin_docs()):
        pending.append(text.encode())
        position += len(pending[-1])
        if sum(map(len, pending)) >= CHUNK_BYTES:
            yield RawChunk("the standard library", position, tuple(pending), unit="document")
            pending = []
    yield RawChunk("the standard library", position, tuple(pending), unit="document")


def _read_library_sources() -> Iterator[str]:
    for path in _list_standard_library():
        with tokenize.open(path) as stream:
            yield stream.read()


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
