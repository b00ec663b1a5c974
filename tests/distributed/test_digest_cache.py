"""Kept digests: they are believed only while size, times and inode are those of the files that were read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from megatron_ligo.common import file_digest
from megatron_ligo.distributed import digest_cache
from megatron_ligo.distributed.digest_cache import SAMPLED, WHOLE, DigestCache


@pytest.fixture
def settled(monkeypatch):
    """Every file counts as old enough to have its digest kept."""
    monkeypatch.setattr(digest_cache, "is_settled", lambda stamp: True)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The files that are read from here on."""
    read: list[Path] = []
    hash_part = digest_cache.hash_file_part

    def recorded(path, *part):
        read.append(path)
        return hash_part(path, *part)

    monkeypatch.setattr(digest_cache, "hash_file_part", recorded)
    return read


def digest(path: Path, **options) -> str:
    return DigestCache(**options).digest_files({path: WHOLE})[path]


def test_a_digest_is_kept_until_the_file_changes(tmp_path, settled, reads):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    first = digest(path)
    assert first == digest(path) == file_digest.hash_bytes(b"abc") and len(reads) == 1
    status = path.stat()
    # The same size, with the time of the content set back.
    path.write_bytes(b"abd")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest(path) == file_digest.hash_bytes(b"abd") != first and len(reads) == 2
    digest(path, recompute=True)
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_not_kept(tmp_path, reads):
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    assert digest(path) == digest(path) and len(reads) == 2
    assert not file_digest.is_settled(file_digest.stamp_file(path))
    assert file_digest.is_settled([0, 0, time.time_ns() - 3 * 10**9, 0])


@pytest.mark.parametrize("content", ["", "[]", "{", '{"digests": 3}', None])
def test_damaged_kept_digests_are_computed_again(tmp_path, settled, reads, content):
    path, kept = tmp_path / "a.bin", tmp_path / ".a.bin.digest"
    path.write_bytes(b"abc")
    first = digest(path)
    if content is None:
        record = json.loads(kept.read_text())
        record["digests"][WHOLE] = "0" * 32
        content = json.dumps(record)
    kept.write_text(content)
    assert digest(path) == first and len(reads) == 2
    assert digest(path) == first and len(reads) == 2


def test_a_folder_that_cannot_be_written(tmp_path, settled, reads, monkeypatch):
    path, write = tmp_path / "a.bin", digest_cache.write_json
    path.write_bytes(b"abc")

    def refuse(target, value):
        if target.parent == tmp_path:
            raise PermissionError(13, "denied", str(target))
        write(target, value)

    monkeypatch.setattr(digest_cache, "write_json", refuse)
    assert digest(path) == digest(path) and len(reads) == 2
    assert digest(path, fallback=tmp_path / "kept") == digest(path, fallback=tmp_path / "kept") and len(reads) == 3


def test_samples_and_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(file_digest, "PART", 1000)
    monkeypatch.setattr(file_digest, "SAMPLE_BLOCK", 16)
    monkeypatch.setattr(file_digest, "SAMPLE_BLOCKS", 8)
    path = tmp_path / "a.bin"
    content = bytes(range(256)) * 20
    path.write_bytes(content)
    whole, sampled = digest(path), DigestCache().digest_files({path: SAMPLED})[path]
    assert whole == file_digest.digest_file(path) != sampled
    parts = file_digest.list_parts(len(content), sampled=True)
    assert parts[0] == (0, 16) and parts[-1] == (len(content) - 16, 16) and len(parts) == 8
    for at in range(0, len(content), 37):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert digest(path) != whole
        is_sampled = any(offset <= at < offset + size for offset, size in parts)
        assert (DigestCache().digest_files({path: SAMPLED})[path] != sampled) == is_sampled


def digest_together(path: str) -> str:
    from megatron_ligo.distributed import mesh

    file_digest.PART = 1000
    return DigestCache(mesh.all_ranks(), recompute=True).digest_files({Path(path): WHOLE})[Path(path)]


def test_ranks_share_the_bytes(tmp_path, pools, monkeypatch):
    path = tmp_path / "a.bin"
    path.write_bytes(os.urandom(10_500))
    monkeypatch.setattr(file_digest, "PART", 1000)
    assert pools(2).run(digest_together, path=str(path)) == file_digest.digest_file(path)


def test_files_that_are_read_slowly_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr(digest_cache, "ALWAYS_WHOLE", 1000)
    small, large = tmp_path / "small.bin", tmp_path / "large.bin"
    small.write_bytes(bytes(10))
    large.write_bytes(bytes(2000))
    for rate, kind in ((1e8, SAMPLED), (2e9, WHOLE)):
        monkeypatch.setattr(DigestCache, "_measure_rate", lambda self, path, rate=rate: rate)
        assert DigestCache().choose_kinds([small, large]) == {small: WHOLE, large: kind}
    monkeypatch.setattr(DigestCache, "_measure_rate", lambda self, path: 1e8)
    assert DigestCache(recompute=True).choose_kinds([large]) == {large: WHOLE}
