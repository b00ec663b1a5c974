"""Digests of files: holes count as the zeros that they are, without being read."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ligo.common import file_digest
from megatron_ligo.common.file_digest import hash_bytes, hash_file_part

SIZE = 3 << 20
DATA = b"some data" * 1000


def write(path, positions):
    with path.open("wb") as file:
        file.truncate(SIZE)
        for position in positions:
            file.seek(position)
            file.write(DATA)
    return path


@pytest.mark.parametrize("positions", [(), (0,), (1 << 20,), (5000, 2 << 20), (SIZE - len(DATA),)])
@pytest.mark.parametrize("part", [(0, SIZE), (1, SIZE - 1), (100_000, 2 << 20), (SIZE, 0), (0, 0)])
def test_a_hole_is_zeros(tmp_path, positions, part):
    path = write(tmp_path / "file", positions)
    offset, size = part
    assert hash_file_part(path, offset, size) == hash_bytes(path.read_bytes()[offset : offset + size])


@pytest.mark.parametrize("positions", [(), (0,), (5000, 2 << 20)])
def test_a_part_beyond_the_end_has_no_digest(tmp_path, positions):
    path = write(tmp_path / "file", positions)
    assert hash_file_part(path, 0, SIZE + 1) is None
    assert hash_file_part(path, SIZE, 1) is None


def test_a_hole_is_not_read(tmp_path):
    path = write(tmp_path / "file", (1 << 20,))
    if path.stat().st_blocks * 512 > SIZE // 2:
        pytest.skip("this file system has no holes")

    def count_read_bytes():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = count_read_bytes()
    hash_file_part(path, 0, SIZE)
    assert len(DATA) <= count_read_bytes() - before < SIZE // 2


def test_a_file_system_without_holes_is_read_whole(tmp_path, monkeypatch):
    path = write(tmp_path / "file", (5000,))

    def refuse(*_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(file_digest.os, "lseek", refuse)
    assert hash_file_part(path, 0, SIZE) == hash_bytes(path.read_bytes())
