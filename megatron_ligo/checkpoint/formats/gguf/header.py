"""Reads the header of a GGUF file: its metadata and each tensor's byte range.

The gguf package's reader is not used: it takes seconds for a vocabulary, and loops forever on a header that declares
more values than the file has bytes. This parser trusts no count beyond the end of the file.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMS = 4
# The format's limits: bytes of a key and of a tensor's name (llama.cpp: 64), a file's alignment, nested lists.
MAX_KEY_BYTES, MAX_NAME_BYTES, ALIGNMENT_UNIT, MAX_DEPTH = 65535, 255, 8, 8
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_SHOWN_BYTES = 40
DAMAGED = "It is truncated or damaged: download it again."


@dataclass(frozen=True)
class TensorBlock:
    """A tensor in a file. shape: in torch's order (GGUF reverses it); offset: from the file's start, in bytes."""

    path: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, object]
    tensors: dict[str, TensorBlock]


def read_header(path: Path) -> GgufHeader:
    """Reads a file's header. Raises CheckpointError if it is truncated or contradicts itself."""
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        raise CheckpointError(Problem(f"{path}", "a GGUF file", "an empty file, or none"))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _HeaderParser(data, path).read()
        except _TruncatedHeader:
            raise CheckpointError(
                Problem(f"{path}", "a header that ends within the file", "a longer one", DAMAGED)
            ) from None


class _TruncatedHeader(Exception):
    pass


class _HeaderParser:
    """Parses a mapped file from its start; `at` is the current offset."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def read(self) -> GgufHeader:
        self._expect("the magic", self._take(len(MAGIC)), (MAGIC,))
        self._check_version(self._number("I"))
        tensors, pairs = self._number("Q"), self._number("Q")
        metadata: dict[str, object] = {}
        for _ in range(pairs):
            name = self._name("a key", MAX_KEY_BYTES)
            if name in metadata:
                raise CheckpointError(Problem(f"{self.path}: {name}", "one value", "two"))
            metadata[name] = self._value(self._number("I"), 0)
        infos = [self._tensor_info() for _ in range(tensors)]
        return GgufHeader(metadata, self._locate_tensors(infos, metadata.get("general.alignment", 32)))

    def _take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _TruncatedHeader
        self.at += count
        return self.data[self.at - count : self.at]

    def _number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))[0]

    def _check_version(self, version: int) -> None:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        if swapped in VERSIONS:
            hint = "Convert it with the gguf package's gguf-convert-endian."
            raise CheckpointError(Problem(f"{self.path}", "a little-endian GGUF file", "a big-endian one", hint))
        self._expect("version", version, VERSIONS)

    def _string(self) -> str:
        """Returns a value's text. Bytes that are no UTF-8 become lone surrogates: the text may not matter."""
        return self._take(self._number("Q")).decode(errors="surrogateescape")

    def _name(self, what: str, limit: int) -> str:
        content = self._take(self._number("Q"))
        try:
            name = content.decode() if len(content) <= limit else ""
        except UnicodeDecodeError:
            name = ""
        if not name.isprintable() or not name:
            found = ascii(content[:MAX_SHOWN_BYTES])
            raise CheckpointError(
                Problem(f"{self.path}: {what}", f"printable text of 1 to {limit} bytes of UTF-8", found, DAMAGED)
            )
        return name

    def _value(self, kind: int, depth: int) -> object:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        self._expect("type of a value", kind, (ARRAY,))
        if depth == MAX_DEPTH:
            raise CheckpointError(Problem(f"{self.path}", f"at most {MAX_DEPTH} nested lists", "more", DAMAGED))
        kind, count = self._number("I"), self._number("Q")
        if kind in SCALARS:
            form = f"<{count}{SCALARS[kind]}"
            if count > self.size:
                raise _TruncatedHeader
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        return [self._value(kind, depth + 1) for _ in range(count)]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self._name("a tensor's name", MAX_NAME_BYTES), self._number("I")
        if dims > MAX_DIMS:
            raise CheckpointError(Problem(f"{self.path}: {name}", f"at most {MAX_DIMS} dims", dims))
        shape = tuple(reversed([self._number("Q") for _ in range(dims)]))
        return name, shape, self._number("I"), self._number("Q")

    def _locate_tensors(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], alignment: object
    ) -> dict[str, TensorBlock]:
        """Returns each tensor's block in the file. Raises CheckpointError if blocks overlap or exceed the file."""
        errors = ErrorCollector(
            f"{self.path}: the header describes tensors that the file does not hold", CheckpointError
        )
        if type(alignment) is not int or alignment < ALIGNMENT_UNIT or alignment & (alignment - 1):
            errors.add("general.alignment", f"a power of two from {ALIGNMENT_UNIT}", describe_value(alignment))
            errors.raise_if_any()
        start = -(-self.at // alignment) * alignment
        blocks: dict[str, TensorBlock] = {}
        end, previous = start, "the header"
        for name, shape, number, offset in sorted(infos, key=lambda info: info[3]):
            block = _parse_block(self.path, name, shape, number, start + offset, errors)
            if block is None:
                continue
            if name in blocks:
                errors.add(name, "one tensor of that name", "two")
            if offset % alignment:
                errors.add(name, f"an offset that is a multiple of {alignment}", offset)
            if block.offset < end:
                errors.add(name, f"bytes of its own, after {previous}", "an overlap")
            end, previous = block.offset + block.nbytes, name
            if end > self.size:
                errors.add(name, f"an end within the file's {self.size} bytes", end, "The file is truncated.")
            blocks[name] = block
        errors.raise_if_any()
        return blocks

    def _expect(self, field: str, value: object, choices: tuple) -> None:
        if value not in choices:
            expected = " or ".join(map(str, choices))
            raise CheckpointError(Problem(f"{self.path}: {field}", expected, value, DAMAGED))


def _parse_block(
    path: Path, name: str, shape: tuple[int, ...], number: int, offset: int, errors: ErrorCollector
) -> TensorBlock | None:
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        errors.add(name, "a tensor type that the gguf package knows", number)
        return None
    items, nbytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % items:
        errors.add(name, f"rows of whole blocks of {items}", f"shape {shape}")
        return None
    return TensorBlock(path, shape, kind, offset, prod(shape) // items * nbytes)
