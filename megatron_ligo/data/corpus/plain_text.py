"""Reads plain text files, whole or cut into documents at a separator."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.corpus.byte_streams import COMPRESSIONS, read_blocks, read_head
from megatron_ligo.data.corpus.raw_chunks import CHUNK_BYTES, MAX_DOCUMENT_BYTES, RawChunk

# A larger text file is a collection of documents; books have a few megabytes.
LARGE_TEXT_BYTES = 16 << 20
AUTO, WHOLE, BLANK_LINE, END_TOKEN = "auto", "none", "blank-line", "end-token"
# The blanks of blank lines, and a run of such lines. It is searched only where other text follows: so that a block's
# end does not cut it, and because a search of many blanks without an end takes the square of their number.
BLANKS = b" \t\n"
BLANK_LINES = re.compile(rb"\n[ \t\n]*\n")
ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}


@dataclass(frozen=True)
class Separator:
    """What stands between the documents of a file: a text; empty: one or more blank lines."""

    text: str = ""

    def __str__(self) -> str:
        return repr(self.text) if self.text else "blank lines"

    @property
    def pattern(self) -> re.Pattern[bytes]:
        return re.compile(re.escape(self.text.encode())) if self.text else BLANK_LINES


def plan_cuts(
    files: Sequence[Path], option: str, end_token: str, usual_end_tokens: Sequence[str], lone: bool
) -> dict[Path, Separator]:
    """Returns the separator of each text file that is to be cut. DataError if one cannot be, or is too large.

    option: AUTO, WHOLE, BLANK_LINE, END_TOKEN or a text. lone: the one file of `files` is all there is, and a part of
    it is to be held out. AUTO cuts large files and a lone one: at the tokenizer's end token or a usual one if the file
    has it, otherwise at blank lines.
    """
    if option == AUTO:
        cuts = {path: _choose_separator(path, [end_token, *usual_end_tokens], lone) for path in files}
        return {path: separator for path, separator in cuts.items() if separator}
    if option == WHOLE:
        for path in files:
            if _exceeds(path, MAX_DOCUMENT_BYTES):
                raise _too_large(str(path), "Cut it into documents with --separator.")
        return {}
    separator = Separator({BLANK_LINE: "", END_TOKEN: end_token}.get(option, _unescape(option)))
    if not files:
        raise DataError(Problem(f"--separator {option}", "a plain text file to cut", "none", "Leave it out."))
    if not any(_occurs(separator, path) for path in files):
        hint = "Choose another, or --separator none."
        raise DataError(Problem(f"--separator {option}", f"{separator} in a text file", "none", hint))
    return dict.fromkeys(files, separator)


def _unescape(text: str) -> str:
    return re.sub(r"\\[ntr\\]", lambda match: ESCAPES[match[0]], text)


def _exceeds(path: Path, size: int) -> bool:
    """True if a file's content is larger."""
    return len(read_head(path, size + 1)) > size if path.suffix in COMPRESSIONS else path.stat().st_size > size


def _choose_separator(path: Path, end_tokens: Sequence[str], lone: bool) -> Separator | None:
    """Returns the separator of a large or lone file; None for any other."""
    large = _exceeds(path, LARGE_TEXT_BYTES)
    if not large and not lone:
        return None
    head = read_head(path, LARGE_TEXT_BYTES).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    for name in end_tokens:
        if name.encode() in head:
            return Separator(name)
    if BLANK_LINES.search(head.rstrip(BLANKS)):
        return Separator()
    if not large:
        return None
    expected = f"blank lines or one of {list(end_tokens)} between its documents"
    hint = "Name what separates them with --separator."
    raise DataError(Problem(str(path), expected, f"none in its first {LARGE_TEXT_BYTES >> 20} MiB", hint))


def _occurs(separator: Separator, path: Path) -> bool:
    tail = b""
    for block, _ in _normalise_line_ends(path):
        tail += block
        if separator.pattern.search(tail if separator.text else tail.rstrip(BLANKS)):
            return True
        # Room for a separator that a block's end cuts, or for a run of blank lines.
        tail = tail[-(4096 + len(separator.text.encode())) :]
    return False


def read_text_documents(path: Path, separator: Separator | None) -> Iterator[RawChunk]:
    """Yields a text file's documents, with `\n` for any line end. No separator: the file is one document.

    A document that a separator ends has no blank lines at its start and end; blank ones are left out. DataError for a
    document above MAX_DOCUMENT_BYTES.
    """
    if separator:
        yield from _read_pieces(path, separator)
        return
    content = bytearray()
    for block, _ in _normalise_line_ends(path):
        content += block
        if len(content) > MAX_DOCUMENT_BYTES:
            raise _too_large(str(path), "Cut it into documents with --separator.")
    yield RawChunk(str(path), path.stat().st_size, (bytes(content),))


def _read_pieces(path: Path, separator: Separator) -> Iterator[RawChunk]:
    pattern, margin = separator.pattern, len(separator.text.encode())
    buffer, searched, position, number = b"", 0, 0, 1
    documents: list[bytes] = []
    size = 0
    for block, position in _normalise_line_ends(path):
        buffer += block
        start = 0
        end = len(buffer) if separator.text else len(buffer.rstrip(BLANKS))
        for match in pattern.finditer(buffer, searched, end):
            documents.append(buffer[start : match.start()])
            size += match.start() - start
            start = match.end()
        searched = end - start - margin
        buffer, searched = buffer[start:], max(searched, 0)
        if len(buffer) > MAX_DOCUMENT_BYTES:
            raise _too_large(f"{path}, document {number + len(documents)}", f"It has no {separator} to cut it at.")
        if size >= CHUNK_BYTES:
            chunk = _pack_pieces(path, position, documents, number)
            number += len(chunk.documents)
            yield chunk
            documents, size = [], 0
    yield _pack_pieces(path, position, [*documents, buffer], number)


def _pack_pieces(path: Path, position: int, pieces: Sequence[bytes], number: int) -> RawChunk:
    documents = tuple(_trim(piece) for piece in pieces if piece.strip())
    return RawChunk(str(path), position, documents, unit="document", first=number)


def _trim(piece: bytes) -> bytes:
    """Removes the blank lines at the start and end of a text."""
    head, tail = piece[: len(piece) - len(piece.lstrip(BLANKS))], piece[len(piece.rstrip(BLANKS)) :]
    return piece[head.rfind(b"\n") + 1 : len(piece) - len(tail) + len(tail.partition(b"\n")[0])]


def _normalise_line_ends(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yields (block, position) with `\n` for `\r\n` and `\r`, as Python reads text."""
    carried, position = b"", 0
    for block, position in read_blocks(path):
        block = carried + block
        carried = block[-1:] if block.endswith(b"\r") else b""
        block = block[: len(block) - len(carried)]
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        yield block, position
    if carried:
        yield b"\n", position


def _too_large(where: str, hint: str) -> DataError:
    return DataError(Problem(where, f"a document of at most {MAX_DOCUMENT_BYTES >> 20} MiB", "a larger one", hint))
