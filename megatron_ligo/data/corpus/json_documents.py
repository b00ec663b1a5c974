"""Reads JSON files: one object a line, or one array of objects. A file is never held whole."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.byte_streams import read_blocks
from megatron_ligo.data.corpus.raw_chunks import (
    CHUNK_BYTES,
    MAX_LINE_BYTES,
    BadRecord,
    RawChunk,
    encode_text,
    pick_text,
)

BETWEEN_ITEMS = re.compile(r"[\s,]*")


def read_json_lines(path: Path) -> Iterator[RawChunk]:
    """Yields blocks of whole lines. A line above MAX_LINE_BYTES becomes a problem."""
    number, rest, skipping = 1, bytearray(), False
    for index, (block, position) in enumerate(read_blocks(path)):
        rest += block if index else block.removeprefix(codecs.BOM_UTF8)
        if skipping:
            start = rest.find(b"\n") + 1
            del rest[: start or len(rest)]
            number += start > 0
            skipping = not start
        end = rest.rfind(b"\n", max(len(rest) - len(block), 0)) + 1
        if end:
            lines = bytes(rest[:end])
            del rest[:end]
            yield RawChunk(str(path), position, lines=lines, unit="line", first=number)
            number += lines.count(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            problem = Problem(f"line {number}", f"at most {MAX_LINE_BYTES >> 20} MiB", "a longer line")
            yield RawChunk(str(path), position, problems=(problem,))
            rest.clear()
            skipping = True
    if rest:
        yield RawChunk(str(path), path.stat().st_size, lines=bytes(rest), unit="line", first=number)


def read_json_file(path: Path, key: str) -> Iterator[RawChunk]:
    """Yields the documents of a .json file: JSON lines, or an array if it begins with a bracket."""
    first_block = next((block for block, _ in read_blocks(path)), b"")
    if first_block.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_array(path, key)
    return read_json_lines(path)


def _read_array(path: Path, key: str) -> Iterator[RawChunk]:
    documents: list[bytes] = []
    size, first, position = 0, 1, 0
    for number, (value, position) in enumerate(_iterate_array(path), 1):
        problems = ()
        try:
            documents.append(encode_text(pick_text(value, key)))
            size += len(documents[-1])
        except BadRecord as error:
            problems = (Problem(f"item {number}", *error.args),)
        # A chunk ends at a bad item, so that the items after it keep their numbers.
        if problems or size >= CHUNK_BYTES:
            yield RawChunk(str(path), position, tuple(documents), unit="item", first=first, problems=problems)
            documents, size, first = [], 0, number + 1
    yield RawChunk(str(path), position, tuple(documents), unit="item", first=first)


def _iterate_array(path: Path) -> Iterator[tuple[object, int]]:
    """Yields (item, bytes of the file read) of an array. DataError where its syntax is broken or its end is missing."""
    parse = json.JSONDecoder().raw_decode
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    text, wanted, found = "", 0, "no closing bracket"
    blocks = read_blocks(path)
    end = (b"", path.stat().st_size)
    for index, (block, position) in enumerate(chain(blocks, [end])):
        try:
            text += decoder.decode(block, final=not block)
            if not index:
                text = text.lstrip().removeprefix("[")
            # An object of many blocks is not parsed again at each.
            if block and len(text) < wanted:
                continue
            place = 0
            while (place := BETWEEN_ITEMS.match(text, place).end()) < len(text) and text[place] != "]":
                value, place = parse(text, place)
                yield value, position
        except RecursionError:
            raise _broken_array(path, "JSON that is nested too deeply") from None
        except UnicodeDecodeError as error:
            raise _broken_array(path, error) from None
        except json.JSONDecodeError as error:
            # The rest of this object may be in the next block.
            found = f"{error.msg}: {text[place : place + 60]!r}"
        text = text[place:]
        if text.startswith("]"):
            if text[1:].strip() or any(block.strip() for block, _ in blocks):
                raise _broken_array(path, "text after its closing bracket")
            return
        wanted = 2 * len(text)
        if len(text) > MAX_LINE_BYTES:
            break
    raise _broken_array(path, found)


def _broken_array(path: Path, found: object) -> DataError:
    return DataError(Problem(str(path), "JSON lines, or one array of objects", found, "Mend or remove the file."))
