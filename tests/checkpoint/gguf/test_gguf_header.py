"""Headers of GGUF files that lie, or that are odd: one error that a terminal can show, or the file as it is."""

from __future__ import annotations

import struct

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint.gguf.tiny_gguf import Type, add_value, gguf, tensors, write


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*pairs: bytes, infos: tuple[bytes, ...] = (), magic: bytes = b"GGUF", version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(infos), len(pairs))
    return magic + counts + b"".join(pairs) + b"".join(infos)


def info(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


STRING, ARRAY, UINT32 = 8, 9, 4
LLAMA = pair(b"general.architecture", STRING, text(b"llama"))
NESTED = struct.pack("<IQ", ARRAY, 1)
LIES = {
    "a string of 2^60 bytes": header(pair(b"general.name", STRING, struct.pack("<Q", 1 << 60))),
    "a list of 2^60 numbers": header(pair(b"a", ARRAY, struct.pack("<IQ", UINT32, 1 << 60))),
    "a list of 2^60 strings": header(pair(b"a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))),
    "lists without end": header(pair(b"a", ARRAY, NESTED * 5000)),
    "a list of no known type": header(pair(b"a", ARRAY, struct.pack("<IQ", 77, 3))),
    "a value of no known type": header(pair(b"a", 99, b"")),
    "a key twice": header(LLAMA, LLAMA),
    "a key of no UTF-8": header(pair(b"\xff\xfe", UINT32, b"\1\0\0\0")),
    "a key that moves the cursor": header(pair(b"a\x1b[2J", UINT32, b"\1\0\0\0")),
    "a key without a name": header(pair(b"", UINT32, b"\1\0\0\0")),
    "a key of a megabyte": header(pair(b"k" * (1 << 20), UINT32, b"\1\0\0\0")),
    "a tensor that moves the cursor": header(LLAMA, infos=(info(b"\x1b]0;x\x07", (4,), 0, 0),)),
    "a tensor of five dims": header(LLAMA, infos=(info(b"a", (1,) * 5, 0, 0),)),
    "a tensor of no dims": header(LLAMA, infos=(info(b"a", (), 0, 0),)),
    "a tensor of 2^120 numbers": header(LLAMA, infos=(info(b"a", (1 << 60, 1 << 60), 0, 0),)),
    "a tensor of no known type": header(LLAMA, infos=(info(b"a", (4,), 1000, 0),)) + bytes(64),
    "a tensor at an odd offset": header(LLAMA, infos=(info(b"a", (4,), 0, 4),)) + bytes(64),
    "two tensors of one name": header(LLAMA, infos=(info(b"a", (4,), 0, 0), info(b"a", (4,), 0, 32))) + bytes(128),
    "tensors that overlap": header(LLAMA, infos=(info(b"a", (16,), 0, 0), info(b"b", (4,), 0, 32))) + bytes(256),
    "an alignment of 1": header(LLAMA, pair(b"general.alignment", UINT32, b"\1\0\0\0")),
    "an alignment of no number": header(LLAMA, pair(b"general.alignment", STRING, text(b"x"))),
    "version 1": header(LLAMA, version=1),
    "version 4": header(LLAMA, version=4),
    "more tensors than bytes": b"GGUF" + struct.pack("<IQQ", 3, 1 << 63, 0),
    "nothing else": b"GGUF",
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_refused(tmp_path, name):
    path = tmp_path / "a.gguf"
    path.write_bytes(LIES[name])
    with pytest.raises(CheckpointError) as error:
        formats.open(path, "gguf")
    message = str(error.value)
    assert len(message) < 2000
    assert all(char.isprintable() or char == "\n" for char in message)


def test_big_endian_files_are_named(tmp_path):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="expected a little-endian GGUF file, found a big-endian one"):
        formats.open(path)


def test_texts_of_the_description_may_be_anything(tmp_path):
    changes = {"general.name": "a\x1b[2J", "general.description": "\0" * 5000, "general.tags": [["a", "b"], ["c"]]}
    plain = formats.open(write(tmp_path / "a.gguf")).model_config
    path = write(tmp_path / "b.gguf", changes={**changes, "general.author": "0123456789"})
    path.write_bytes(path.read_bytes().replace(b"0123456789", b"\xff\xfe34567\xc3\xc3\xc3"))
    assert formats.open(path).model_config == plain


@pytest.mark.parametrize("alignment", [8, 64, 1024])
def test_alignments(tmp_path, alignment):
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for key, value in formats.open(write(tmp_path / "b.gguf"))._header.metadata.items():
        if key != "general.architecture":
            add_value(writer, key, value)
    for name, tensor in tensors("llama").items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, plain = formats.open(path), formats.open(tmp_path / "b.gguf")
    assert all(ours.read(key).equal(plain.read(key)) for key in plain.keys())  # noqa: SIM118
    assert Type.UINT32 == UINT32
