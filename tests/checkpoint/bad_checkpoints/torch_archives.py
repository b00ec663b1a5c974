"""torch.save files with one defect each: a builder damages a good file and returns words of the reason to refuse it."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

FileBuilder = Callable[[Path], str]
archives: dict[str, FileBuilder] = {}
legacy: dict[str, FileBuilder] = {}
objects: dict[str, FileBuilder] = {}
# Name -> shape. Two of one size, so that one can stand in another's place.
SHAPES = {"a": (6, 5), "b": (5, 6), "c": (7,)}


def good_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def register(table: dict[str, FileBuilder]) -> Callable[[FileBuilder], FileBuilder]:
    def add(builder: FileBuilder) -> FileBuilder:
        table[builder.__name__] = builder
        return builder

    return add


def infos_of(path: Path) -> dict[str, zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename.partition("/")[2]: info for info in archive.infolist()}


def central_entry(content: bytes, name: str) -> int:
    """Returns the offset of a record's entry in the directory."""
    at = content.index(b"PK\1\2")
    while (
        content[at + 46 : at + 46 + struct.unpack_from("<H", content, at + 28)[0]].partition(b"/")[2] != name.encode()
    ):
        at = content.index(b"PK\1\2", at + 4)
    return at


def data_of(content: bytes, info: zipfile.ZipInfo) -> int:
    return info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))


def patch(path: Path, at: int, form: str, value: object) -> None:
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, at, value)
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[str, bytes], Iterable[tuple[str, bytes]]], packing: int = 0) -> None:
    """Writes the archive again with zipfile; `change` returns the records that take one's place."""
    with zipfile.ZipFile(path) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in records:
            for new_name, new_data in change(name, data):
                archive.writestr(new_name, new_data)


@register(archives)
def one_record_for_two_storages(path):
    infos = infos_of(path)
    patch(path, central_entry(path.read_bytes(), "data/1") + 42, "<I", infos["data/0"].header_offset)
    return "another header than the directory says"


@register(archives)
def one_record_under_both_names(path):
    """The header says what the directory says of the second name."""
    infos, content = infos_of(path), bytearray(path.read_bytes())
    entry = central_entry(content, "data/1")
    struct.pack_into("<I", content, entry + 42, infos["data/0"].header_offset)
    start = infos["data/0"].header_offset + 30
    name = b"archive/data/1" if content[start : start + 7] == b"archive" else infos["data/1"].filename.encode()
    content[start : start + len(name)] = name
    path.write_bytes(content)
    return "than the directory says"


@register(archives)
def data_that_begin_elsewhere(path):
    infos = infos_of(path)
    (extra,) = struct.unpack_from("<H", path.read_bytes(), infos["data/1"].header_offset + 28)
    patch(path, infos["data/1"].header_offset + 28, "<H", extra - 4)
    return "checksum"


@register(archives)
def a_size_in_the_local_header(path):
    patch(path, infos_of(path)["data/1"].header_offset + 22, "<I", 28)
    return "another size or checksum than the directory says"


@register(archives)
def a_size_after_the_data(path):
    infos, content = infos_of(path), path.read_bytes()
    patch(path, data_of(content, infos["data/1"]) + infos["data/1"].file_size + 8, "<I", 28)
    return "another size or checksum after its data"


@register(archives)
def a_bit_of_a_tensor(path):
    content = path.read_bytes()
    at = data_of(content, infos_of(path)["data/1"]) + 5
    patch(path, at, "<B", content[at] ^ 1)
    return "record data/1: other bytes than its checksum says"


@register(archives)
def a_bit_of_the_pickle(path):
    content = path.read_bytes()
    at = content.index(b"collections") + 3
    patch(path, at, "<B", content[at] ^ 1)
    return "record data.pkl: other bytes than its checksum says"


@register(archives)
def packed_records(path):
    rewrite(path, lambda name, data: [(name, data)], zipfile.ZIP_DEFLATED)
    return "packed"


@register(archives)
def a_record_twice(path):
    rewrite(path, lambda name, data: [(name, data)] + [(name, bytes(len(data)))] * name.endswith("data/1"))
    return "two records data/1"


@register(archives)
def a_record_twice_in_another_case(path):
    rewrite(path, lambda name, data: [(name, data)] + [(name.replace("data/1", "DATA/1"), data)] * ("data/1" in name))
    return "two records"


@register(archives)
def two_folders(path):
    rewrite(
        path, lambda name, data: [("other/data.pkl", b"N."), (name, data)] if "data.pkl" in name else [(name, data)]
    )
    return "several folders"


@register(archives)
def a_program(path):
    rewrite(
        path,
        lambda name, data: [(name, data), (name.replace("version", "constants.pkl"), b"N.")][
            : 1 + ("/version" in name)
        ],
    )
    return "a program"


@register(archives)
def a_shorter_record(path):
    rewrite(path, lambda name, data: [(name, data[:-4] if name.endswith("data/1") else data)])
    return "storage '1' of 120 bytes: 116 bytes"


@register(archives)
def a_missing_record(path):
    rewrite(path, lambda name, data: [] if name.endswith("data/1") else [(name, data)])
    return "storage '1' of 120 bytes: no record"


@register(archives)
def a_record_too_many(path):
    rewrite(path, lambda name, data: [(name, data)] + [(name[:-1] + "9", data)] * name.endswith("data/1"))
    return "nothing refers to"


@register(archives)
def another_byte_order(path):
    rewrite(path, lambda name, data: [(name, b"middle" if name.endswith("byteorder") else data)])
    return "byte order"


@register(archives)
def bytes_before_the_archive(path):
    path.write_bytes(b"PK\3\4" + bytes(60) + path.read_bytes())
    return "BadZipFile"


@register(archives)
def bytes_after_the_archive(path):
    path.write_bytes(path.read_bytes() + bytes(10))
    return "BadZipFile"


@register(archives)
def an_archive_within_its_comment(path):
    content = bytearray(path.read_bytes())
    struct.pack_into("<H", content, len(content) - 2, len(content))
    path.write_bytes(content + path.read_bytes())
    return "BadZipFile"


@register(archives)
def a_name_of_several_lines(path):
    rewrite(path, lambda name, data: [(name.replace("version", "a\nb") if name.endswith("/version") else name, data)])
    return "a record named"


def legacy_parts(path: Path) -> tuple[bytes, list[str], list[bytes]]:
    """Returns what precedes the list of storages, the list, and each storage with its length."""
    content = path.read_bytes()
    file = io.BytesIO(content)
    for _ in range(3):
        pickle.load(file)

    class Reader(pickle.Unpickler):
        def persistent_load(self, reference: object) -> object:
            return reference

        def find_class(self, module: str, name: str) -> object:
            return OrderedDict if name == "OrderedDict" else lambda *arguments: arguments

    Reader(file).load()
    end, keys, storages = file.tell(), pickle.load(file), []
    for _ in keys:
        (numel,) = struct.unpack("<q", file.read(8))
        storages.append(struct.pack("<q", numel) + file.read(4 * numel))
    assert not file.read()
    return content[:end], keys, storages


def put_legacy(path: Path, head: bytes, keys: object, storages: list[bytes]) -> None:
    path.write_bytes(head + pickle.dumps(keys, 2) + b"".join(storages))


@register(legacy)
def a_storage_that_is_not_filled(path):
    head, keys, storages = legacy_parts(path)
    put_legacy(path, head, keys[:1] + keys[2:], storages[:1] + storages[2:])
    return "1 storages without their numbers"


@register(legacy)
def no_storage_is_filled(path):
    head, _, _ = legacy_parts(path)
    put_legacy(path, head, [], [])
    return "3 storages without their numbers"


@register(legacy)
def a_storage_filled_twice(path):
    head, keys, storages = legacy_parts(path)
    put_legacy(path, head, [keys[0], *keys], [storages[0], *storages])
    return "names one twice"


@register(legacy)
def one_filled_twice_in_place_of_another(path):
    head, keys, storages = legacy_parts(path)
    put_legacy(path, head, [keys[0], keys[0], keys[2]], storages)
    return "names one twice"


@register(legacy)
def a_storage_of_nothing(path):
    head, keys, storages = legacy_parts(path)
    put_legacy(path, head, [*keys, "7"], [*storages, storages[0]])
    return "1 that nothing refers to"


@register(legacy)
def a_storage_of_another_length(path):
    head, keys, storages = legacy_parts(path)
    put_legacy(path, head, keys, sorted(storages, key=lambda storage: (len(storage) == len(storages[0]), len(storage))))
    return "elements for one of"


@register(legacy)
def a_file_cut_off(path):
    path.write_bytes(path.read_bytes()[:-3])
    return "ends too early"


@register(legacy)
def bytes_after_the_end(path):
    path.write_bytes(path.read_bytes() + b"more")
    return "4 bytes after the last storage"


@register(legacy)
def storages_beyond_any_file(path):
    content = path.read_bytes()
    number = b"K\x1e"
    path.write_bytes(content.replace(number, b"J" + struct.pack("<i", (1 << 31) - 1)))
    return "storages of"


@register(legacy)
def a_list_that_is_none(path):
    head, _, storages = legacy_parts(path)
    put_legacy(path, head, 5, storages)
    return "a list of storages"


def saved_with(**changes: object) -> FileBuilder:
    def build(path: Path) -> str:
        torch.save({**good_state(), **changes}, path)
        return ""

    return build


UNUSABLE = {
    "a sparse tensor": lambda t: t.to_sparse(),
    "a sparse tensor by rows": lambda t: t.to_sparse_csr(),
    "a nested tensor": lambda t: torch.nested.nested_tensor([t]),
    "a tensor of the meta device": lambda t: torch.empty(t.shape, device="meta"),
    "a quantized tensor": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "a negated view": lambda t: torch._neg_view(t.clone()),
    "a conjugated view": lambda t: t.to(torch.complex64).conj(),
    "complex numbers": lambda t: t.to(torch.complex64),
    "numbers of 8 bits": lambda t: t.to(torch.float8_e4m3fn),
    "one number for all": lambda t: torch.ones(1, 1).expand(t.shape),
    "one number for a terabyte": lambda t: torch.zeros(1, 1).expand(1 << 30, 1 << 10),
    "rows that overlap": lambda t: torch.arange(200.0).as_strided(t.shape, (1, 1)),
}
