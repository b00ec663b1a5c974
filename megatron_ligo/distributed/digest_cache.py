"""Digests of file contents, computed by the ranks together and kept beside the files, so that a restart takes no time.

The digests of PATH are kept in `.NAME.digest` beside it, with the size, times and inode of each file that they cover.
If any of these has changed, or the kept digests are damaged, they are computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_ligo.common.atomic_files import read_json, write_json
from megatron_ligo.common.errors import MachineError, Problem
from megatron_ligo.common.file_digest import (
    SIDECAR_SUFFIX,
    hash_bytes,
    hash_file_part,
    is_intact,
    is_settled,
    join_digests,
    list_files,
    list_parts,
    seal,
    stamp_file,
)
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup

log = logging.getLogger(__name__)

T = TypeVar("T")

WHOLE, SAMPLED = "whole", "sampled"
# Smaller files are always read whole; of a larger one, blocks are sampled if the ranks together read slower than this.
ALWAYS_WHOLE = 1 << 30
MIN_BYTES_PER_SECOND = 1e9
PROBE_BYTES = 1 << 28
# Reading longer than this is announced.
ANNOUNCED_BYTES = 8 << 30
# Threads of a rank that read and hash.
WORKERS = 2


@dataclass(frozen=True)
class DigestCache:
    """Digests of files and folders. Every method is collective over `ranks`.

    fallback: folder for the digests of files whose own folder is read-only. recompute: reads every file, whatever is
    kept.
    """

    ranks: RankGroup = SINGLE_RANK
    fallback: Path | None = None
    recompute: bool = False

    def digest_files(self, kinds: Mapping[Path, str]) -> dict[Path, str]:
        """Returns the digest of each file. kinds: WHOLE or SAMPLED, for each."""
        paths = sorted(kinds)
        kept = self._on_rank_0(lambda: {path: self._load(path, kinds[path]) for path in paths})
        missing = [path for path in paths if kept[path] is None]
        if missing:
            stamps = self._on_rank_0(lambda: {path: _stamp(path) for path in missing})
            computed = self._compute({path: (stamps[path][0][1], kinds[path]) for path in missing})
            with self.ranks.agree():
                for path in missing if self.ranks.rank == 0 else ():
                    self._keep(path, kinds[path], computed[path], stamps[path])
            kept |= computed
        return {path: f"{kept[path]}" for path in paths}

    def digest_folder(self, folder: Path) -> dict[str, str]:
        """Returns the digest of every file below a folder by its name; hidden files are left out."""

        def read_all() -> dict[str, str]:
            files = self._on_rank_0(lambda: list_files(folder))
            return {str(file.relative_to(folder)): digest for file, digest in self.read_files(files).items()}

        return self.digest_content(folder, "files", read_all)

    def digest_content(self, path: Path, kind: str, compute: Callable[[], T]) -> T:
        """Returns what is kept as `kind` of a file or folder (JSON); if nothing is, that of `compute` (collective)."""
        digest, stamps = self._on_rank_0(lambda: (self._load(path, kind), _stamp(path)))
        if digest is None:
            digest = compute()
            with self.ranks.agree():
                if self.ranks.rank == 0:
                    self._keep(path, kind, digest, stamps)
        return digest

    def read_files(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Returns the digest of each whole file, read now; nothing is kept."""
        sizes = self._on_rank_0(lambda: [path.stat().st_size for path in paths])
        return self._compute({path: (size, WHOLE) for path, size in zip(paths, sizes, strict=True)})

    def choose_kinds(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Returns WHOLE or SAMPLED for each file: WHOLE if it is small, already digested, or read fast enough."""

        def keep_or_size() -> dict[Path, int]:
            return {path: 0 if self._load(path, WHOLE) else path.stat().st_size for path in paths}

        sizes = self._on_rank_0(keep_or_size)
        large = [path for path in paths if sizes[path] > ALWAYS_WHOLE]
        if (
            large
            and not self.recompute
            and self._measure_rate(max(large, key=sizes.__getitem__)) < MIN_BYTES_PER_SECOND
        ):
            log.info("%d large files are read slowly: their digests cover samples (--full-check reads all)", len(large))
            return {path: SAMPLED if path in large else WHOLE for path in paths}
        return dict.fromkeys(paths, WHOLE)

    def _measure_rate(self, path: Path) -> float:
        """Returns how many bytes a second the ranks read together; each reads another part."""
        start = time.monotonic()
        offset = self.ranks.rank * PROBE_BYTES % max(path.stat().st_size - PROBE_BYTES, 1)
        hash_file_part(path, offset, PROBE_BYTES)
        return sum(self.ranks.all_gather(PROBE_BYTES / max(time.monotonic() - start, 1e-9)))

    def _compute(self, files: Mapping[Path, tuple[int, str]]) -> dict[Path, str]:
        """Reads files, given with size and kind, by the ranks together: each takes its share of the parts."""
        parts = [(path, part) for path, (size, kind) in files.items() for part in list_parts(size, kind == SAMPLED)]
        total = sum(size for _, (_, size) in parts)
        if total > ANNOUNCED_BYTES:
            log.info("digests of %d files are computed once: %.0f GB", len(files), total / 1e9)
        with self.ranks.agree(), ThreadPoolExecutor(WORKERS) as pool:
            share = parts[self.ranks.rank :: self.ranks.world_size]
            own = list(pool.map(lambda item: hash_file_part(item[0], *item[1]), share))
        digests: dict[Path, list[str]] = {path: [] for path in files}
        shares = self.ranks.all_gather(own)
        for number, (path, _) in enumerate(parts):
            digest = shares[number % self.ranks.world_size][number // self.ranks.world_size]
            if digest is None:
                hint = "Start again once nothing writes to it."
                raise MachineError(Problem(f"{path}", f"{files[path][0]} bytes, as before it was read", "fewer", hint))
            digests[path].append(digest)
        return {path: join_digests(size, digests[path]) for path, (size, _) in files.items()}

    def _on_rank_0(self, work: Callable[[], object]):
        with self.ranks.agree():
            result = work() if self.ranks.rank == 0 else None
        return self.ranks.all_gather(result)[0]

    def _load(self, path: Path, kind: str) -> object | None:
        if self.recompute:
            return None
        for place in self._places(path):
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                record = read_json(place)
                if is_intact(record) and record["stamps"] == _stamp(path):
                    return record["digests"].get(kind)
        return None

    def _keep(self, path: Path, kind: str, digest: object, stamps: list) -> None:
        """Keeps a digest, unless its files have changed since `stamps` or may still change unseen."""
        if _stamp(path) != stamps or not all(is_settled(stamp) for _, *stamp in stamps):
            return
        for place in self._places(path):
            digests = {}
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                record = read_json(place)
                if is_intact(record) and record["stamps"] == stamps:
                    digests = dict(record["digests"])
            with suppress(OSError):
                place.parent.mkdir(parents=True, exist_ok=True)
                write_json(place, seal({"stamps": stamps, "digests": {**digests, kind: digest}}))
                return

    def _places(self, path: Path) -> list[Path]:
        path = path.resolve()
        places = [path.with_name(f".{path.name}{SIDECAR_SUFFIX}")]
        if self.fallback:
            places.append(self.fallback / f"{hash_bytes(str(path).encode())}{SIDECAR_SUFFIX}")
        return places


def _stamp(path: Path) -> list[list]:
    """Returns [name, size, times, inode] of each file of a path."""
    root = path.parent if not path.is_dir() else path
    return [[str(file.relative_to(root)), *stamp_file(file)] for file in list_files(path)]
