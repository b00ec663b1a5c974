"""Chunks of undecoded documents, which a reader cuts from its file, and their parsing, which the workers do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_ligo.common.errors import Problem

# A reader's blocks and chunks, and what a worker gets at a time: its tokenizer needs about 200 times its size.
CHUNK_BYTES = 1 << 18
# A larger document, or line of a JSON file, is an error: it would not fit a bounded memory.
MAX_DOCUMENT_BYTES = 32 << 20
MAX_LINE_BYTES = 2 * MAX_DOCUMENT_BYTES


@dataclass(frozen=True)
class RawChunk:
    """Consecutive records of one file.

    path: the file, as messages name it. position: bytes of the file that are read, this chunk included.
    documents: UTF-8 texts; None where a table has no value. lines: whole lines of a JSON-lines file, instead.
    unit: what a record of the file is called; empty if the file is one document. first: number of the first record.
    problems: records that the reader could not deliver.
    """

    path: str
    position: int
    documents: tuple[bytes | None, ...] = ()
    lines: bytes = b""
    unit: str = ""
    first: int = 1
    problems: tuple[Problem, ...] = ()

    @property
    def size(self) -> int:
        return len(self.lines) + sum(map(len, filter(None, self.documents)))


@dataclass(frozen=True)
class ParsedChunk:
    """texts and their UTF-8 bytes, in order, and a problem for each bad record."""

    texts: list[str]
    encoded: list[bytes]
    problems: list[Problem]


class BadRecord(Exception):
    """A record without a usable text. args: expected, found."""


def parse_chunk(chunk: RawChunk, json_key: str) -> ParsedChunk:
    """Decodes a chunk. json_key: the key of the text in a JSON line."""
    texts: list[str] = []
    encoded: list[bytes] = []
    problems = list(chunk.problems)
    records = _split_lines(chunk.lines) if chunk.lines else enumerate(chunk.documents)
    for index, record in records:
        try:
            if chunk.lines:
                text = read_json_text(record, json_key)
                data = encode_text(text)
            else:
                text, data = _decode(record), record
            if len(data) > MAX_LINE_BYTES:
                raise BadRecord(f"a text of at most {MAX_LINE_BYTES >> 20} MiB", f"{len(data)} bytes")
        except BadRecord as error:
            where = f"{chunk.unit} {chunk.first + index}" if chunk.unit else chunk.path
            problems.append(Problem(where, *error.args))
            continue
        texts.append(text)
        encoded.append(data)
    return ParsedChunk(texts, encoded, problems)


def _split_lines(block: bytes) -> Iterator[tuple[int, str | bytes]]:
    """Yields (index, line) of each line that is not blank: a string, or bytes if the block is not all UTF-8."""
    try:
        lines: Iterable[str | bytes] = block.decode().split("\n")
    except UnicodeDecodeError:
        lines = block.split(b"\n")
    return ((index, line) for index, line in enumerate(lines) if line and not line.isspace())


def read_json_text(line: str | bytes, key: str) -> str:
    """Returns the string under `key` of a JSON object. BadRecord if there is none."""
    expected = f"an object with a string under {key!r}"
    if isinstance(line, bytes):
        line = _decode(line)
    try:
        value = json.loads(line)
    except ValueError as error:
        raise BadRecord(expected, f"{type(error).__name__}: {error}") from None
    except RecursionError:
        raise BadRecord(expected, "JSON that is nested too deeply") from None
    return pick_text(value, key)


def pick_text(value: object, key: str) -> str:
    """Returns the string under `key` of a parsed JSON value. BadRecord if there is none."""
    if not isinstance(value, dict):
        raise BadRecord(f"an object with a string under {key!r}", type(value).__name__)
    if key not in value:
        raise BadRecord(f"an object with a string under {key!r}", f"the keys {str(list(value)[:10])[:200]}")
    text = value[key]
    if not isinstance(text, str):
        raise BadRecord(f"a string under {key!r}", type(text).__name__)
    return text


def encode_text(text: str) -> bytes:
    """Returns a text's UTF-8 bytes. BadRecord if it has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise BadRecord("text that has a UTF-8 form", found) from None


def _decode(data: bytes | None) -> str:
    if data is None:
        raise BadRecord("a text", "no value")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"the byte 0x{data[error.start]:02x} ({error.reason}) in its line {line}"
        raise BadRecord("UTF-8 text", found) from None
