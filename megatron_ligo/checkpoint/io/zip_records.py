"""The records of a torch.save archive, checked against each other before any of them is read.

A zip archive describes each record twice, before its data and in the directory at its end, and programs differ in what
they believe. An archive whose descriptions differ, whose records overlap or are packed is refused.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np

MAGIC = b"PK\3\4"
# Fixed parts of the headers: signature, then the fields in their order.
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
END_OF_DIRECTORY = struct.Struct("<4s4H2IH")
# Two further records before that one, which hold its numbers in 64 bits; torch always writes them.
END_OF_DIRECTORY_64, LOCATOR_64 = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
END_SIGNATURE, END_SIGNATURE_64, LOCATOR_SIGNATURE = b"PK\5\6", b"PK\6\6", b"PK\6\7"
DESCRIPTOR_SIGNATURE = b"PK\7\b"
ENCRYPTED, HAS_DESCRIPTOR, UTF8 = 1, 1 << 3, 1 << 11
IN_EXTRA_FIELD = 0xFFFFFFFF
# Name of a record that makes torch execute the archive as a program.
PROGRAM = "constants.pkl"


@dataclass(frozen=True)
class ZipRecord:
    """A record's bytes in the archive: offset and size. crc: their CRC-32, None if the writer computed none."""

    name: str
    offset: int
    size: int
    crc: int | None

    def check(self, data: np.ndarray | bytes) -> None:
        """Raises BadZipFile unless the record's bytes, (size,) uint8, have its checksum."""
        if self.crc is not None and zlib.crc32(data) != self.crc:
            raise BadZipFile(f"record {self.name}: other bytes than its checksum says")


def read_records(file: BinaryIO, length: int) -> dict[str, ZipRecord]:
    """Returns the records of an archive that fills a file of `length` bytes, by name without the archive's folder.

    Raises BadZipFile or another error of zipfile for any archive that torch.save does not write.
    """
    with ZipFile(file) as archive:
        infos = archive.infolist()
        _check_end(file, length, archive)
    roots = {info.filename.partition("/")[0] for info in infos}
    if len(roots) != 1:
        raise BadZipFile("records in several folders" if roots else "no records")
    ranges = []
    for info in infos:
        _check_plain(info)
        offset = _check_local_header(file, info)
        ranges.append((info.header_offset, offset, offset + info.file_size, info))
    _check_apart(ranges, archive.start_dir)
    # torch.serialization.set_crc32_options(False) stores zeros for all records.
    has_checksums = any(info.CRC for info in infos)
    records = {}
    for _, offset, end, info in ranges:
        name = info.filename.partition("/")[2]
        # torch looks names up in any case.
        if name.lower() in records:
            raise BadZipFile(f"two records {name}")
        records[name.lower()] = ZipRecord(name, offset, end - offset, info.CRC if has_checksums else None)
    if PROGRAM in records:
        raise BadZipFile("a program (TorchScript), not tensors")
    return {record.name: record for record in records.values()}


def _check_end(file: BinaryIO, length: int, archive: ZipFile) -> None:
    """Checks that the directory ends with the file and begins where it says: no other can be seen in its place."""
    file.seek(length - END_OF_DIRECTORY.size)
    end = file.read(END_OF_DIRECTORY.size)
    signature, _, _, _, count, size, offset, comment = END_OF_DIRECTORY.unpack(end)
    if signature != END_SIGNATURE or comment or end.count(END_SIGNATURE) > 1:
        raise BadZipFile("bytes after its directory")
    directory_end = length - END_OF_DIRECTORY.size
    ends_64 = END_OF_DIRECTORY_64.size + LOCATOR_64.size
    file.seek(max(directory_end - ends_64, 0))
    further = file.read(ends_64)
    if len(further) == ends_64 and further[END_OF_DIRECTORY_64.size :].startswith(LOCATOR_SIGNATURE):
        directory_end -= ends_64
        signature, *_, count_64, size_64, offset_64 = END_OF_DIRECTORY_64.unpack_from(further)
        _, _, place, _ = LOCATOR_64.unpack_from(further, END_OF_DIRECTORY_64.size)
        stated = ((count, count_64, 0xFFFF), (size, size_64, IN_EXTRA_FIELD), (offset, offset_64, IN_EXTRA_FIELD))
        agree = all(small in (large, saturated) for small, large, saturated in stated)
        if signature != END_SIGNATURE_64 or place != directory_end or not agree:
            raise BadZipFile("two ends of its directory that differ")
        count, size, offset = count_64, size_64, offset_64
    if (archive.start_dir, count, offset + size) != (offset, len(archive.infolist()), directory_end):
        raise BadZipFile("a directory that is not where its end says")
    if min((info.header_offset for info in archive.infolist()), default=0) != 0:
        raise BadZipFile("bytes before its first record")


def _check_plain(info: ZipInfo) -> None:
    name = info.orig_filename
    if info.compress_type != ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & ENCRYPTED:
        raise BadZipFile(f"record {name!r}: packed or encrypted")
    if not name.isprintable() or "/" not in name.strip("/") or info.filename != name:
        raise BadZipFile(f"a record named {name!r}")


def _check_local_header(file: BinaryIO, info: ZipInfo) -> int:
    """Checks a record's own header and descriptor against the directory. Returns the offset of its data."""
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size:
        raise BadZipFile(f"record {info.filename}: no header where the directory says")
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack(header)
    name = file.read(name_length).decode("utf-8" if flags & UTF8 else "cp437")
    if signature != MAGIC or name != info.orig_filename or method != ZIP_STORED or flags & ENCRYPTED:
        raise BadZipFile(f"record {info.filename}: another header than the directory says")
    has_descriptor = bool(flags & HAS_DESCRIPTOR)
    later = (0,) if has_descriptor else ()
    if crc not in (info.CRC, *later) or any(
        value not in (info.file_size, IN_EXTRA_FIELD, *later) for value in (packed, size)
    ):
        raise BadZipFile(f"record {info.filename}: another size or checksum than the directory says")
    offset = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
    if has_descriptor:
        _check_descriptor(file, info, offset)
    return offset


def _check_descriptor(file: BinaryIO, info: ZipInfo, offset: int) -> None:
    """Checks the description that follows a record's data. Writers may leave it out, or its signature."""
    file.seek(offset + info.file_size)
    descriptor = file.read(24)
    if descriptor[:4] != DESCRIPTOR_SIGNATURE:
        return
    expected = (info.CRC, info.file_size, info.file_size)
    stated = [
        struct.unpack_from(form, descriptor, 4)
        for form in ("<3I", "<I2Q")
        if len(descriptor) >= 4 + struct.calcsize(form)
    ]
    if expected not in stated:
        raise BadZipFile(f"record {info.filename}: another size or checksum after its data")


def _check_apart(ranges: list[tuple[int, int, int, ZipInfo]], directory: int) -> None:
    """Checks that no two records share bytes, and that all end before the directory."""
    end, previous = 0, ""
    for start, _, stop, info in sorted(ranges, key=lambda entry: entry[:3]):
        if start < end:
            raise BadZipFile(f"records {previous} and {info.filename} share bytes")
        end, previous = stop, info.filename
    if end > directory:
        raise BadZipFile(f"record {previous}: an end beyond the archive's records")
