"""A target folder that appears whole or not at all: built beside its place, fsynced, renamed into it.

Beside `target` stands `.target.partial/` while work goes on: `content/` (what will be the target), `journal.jsonl`
(what of it is whole) and `lock`. A run that is killed leaves it; the next run of the same job goes on from it.
Where several processes build it, each but the first has a journal of its own, `journal.N.jsonl`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from megatron_ligo.checkpoint.io import digest, journal
from megatron_ligo.checkpoint.io.journal import Journal
from megatron_ligo.checkpoint.io.output import SKELETONS
from megatron_ligo.common.atomic_files import fsync_folders, replace_folder, restore_backup
from megatron_ligo.common.errors import CheckpointError, MachineError, Problem
from megatron_ligo.common.file_lock import lock_file

# Room besides the tensors, at least: headers, configs, records. If a file system wants more, writing shows it.
SPARE_BYTES = 1 << 20


class Staging:
    """The place where one job builds one target. A context manager, which locks it; `begin` starts, `commit` ends."""

    def __init__(self, target: Path, job: object):
        self.target = target
        self.partial = target.parent / f".{target.name}.partial"
        self.content = self.partial / "content"
        self.job = digest.hash_bytes(json.dumps(job, sort_keys=True).encode())
        self.resumed = False

    def __enter__(self) -> Staging:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_target(self.partial / "lock", self.target)
        self.journal = Journal()
        restore_backup(_backup(self.target), self.target)
        return self

    def begin(self) -> None:
        """Goes on from what an earlier run of the same job left, or from nothing."""
        path = self.partial / "journal.jsonl"
        self.journal = Journal(path)
        if self.journal.get("job") != self.job:
            self.journal.close()
            path.unlink()
            for other in self._other_journals():
                other.unlink()
            shutil.rmtree(self.content, ignore_errors=True)
            self.journal = Journal(path)
            self.journal.add("job", value=self.job)
        self.absorb_journals()
        self.resumed = len(self.journal.entries) > 1
        self.content.mkdir(exist_ok=True)

    def absorb_journals(self) -> None:
        """Takes over what the other processes have done, which are no longer at work."""
        for path in self._other_journals():
            self.journal.absorb(path)
            path.unlink()
        for scratch in self.content.glob(f"{SKELETONS}*"):
            shutil.rmtree(scratch)

    def open_rank_journal(self, rank: int) -> Journal:
        """A new journal of another process, which knows what the first one's knew."""
        path = self.partial / f"journal.{rank}.jsonl"
        path.unlink(missing_ok=True)
        made = Journal(path)
        made.entries |= journal.read_journal(self.partial / "journal.jsonl")[0]
        return made

    def _other_journals(self) -> list[Path]:
        return sorted(self.partial.glob("journal.*.jsonl"))

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        if not self._has_progress():
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def _has_progress(self) -> bool:
        """Whether anything is whole that another run could go on from."""
        known = [self.partial / "journal.jsonl", *self._other_journals()]
        return any(key != ("job",) for path in known for key in journal.read_journal(path)[0])

    def check_space(self, needed: int) -> None:
        """Raises CheckpointError if the disk cannot take `needed` bytes (less what is there from before)."""
        there = sum(file.stat().st_blocks * 512 for file in self.content.rglob("*") if file.is_file())
        needed = max(needed - there, 0) + SPARE_BYTES
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            hint = "Free some, or choose a target on another disk."
            raise MachineError(Problem(f"{self.target}", f"{needed:,} bytes free on its disk", f"{free:,}", hint))

    def discard(self) -> None:
        """Takes everything back: there is nothing to go on from."""
        self.journal.close()
        shutil.rmtree(self.partial)

    def commit(self, names: Iterable[str]) -> None:
        """Renames the content, of which `names` are the (fsynced) files, into the place of whatever was there."""
        kept = {self.content / name for name in names}
        for file in [file for file in self.content.rglob("*") if file.is_file() and file not in kept]:
            file.unlink()
        fsync_folders(self.content)
        replace_folder(self.content, self.target, _backup(self.target))
        self.discard()


def _backup(target: Path) -> Path:
    """Where the previous target stays while `commit` replaces it."""
    return target.parent / f".{target.name}.replaced"


def _lock_target(path: Path, target: Path) -> IO[str]:
    file = lock_file(path)
    if file is None:
        found = "another process that writes it"
        raise CheckpointError(Problem(f"{target}", "to be alone", found, "Wait for it, or end it."))
    return file
