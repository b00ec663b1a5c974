"""Builds a target folder that appears whole or not at all: staged beside it, fsynced, then renamed.

`.target.partial/` holds the work in progress: `content/` (the future target), `journal.jsonl` (which of its tensors
are complete) and `lock`. A killed run leaves it behind, and the next run of the same job resumes from it. If several
ranks build the target, every rank N but 0 has a journal of its own, `journal.N.jsonl`.
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

# Headers, configs and records need at least this much besides the tensors. A file system may need more.
SPARE_BYTES = 1 << 20


class Staging:
    """The staging folder of one job and target, locked inside its context.

    `begin` starts or resumes the job, `commit` publishes the target.
    """

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
        """Resumes what an earlier run of the same job left, or starts from an empty folder."""
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
        """Merges the journals of the other ranks, which have finished, and removes their scratch files."""
        for path in self._other_journals():
            self.journal.absorb(path)
            path.unlink()
        for scratch in self.content.glob(f"{SKELETONS}*"):
            shutil.rmtree(scratch)

    def open_rank_journal(self, rank: int) -> Journal:
        """Creates the journal of a rank other than 0, with the entries of rank 0's."""
        path = self.partial / f"journal.{rank}.jsonl"
        path.unlink(missing_ok=True)
        rank_journal = Journal(path)
        rank_journal.entries |= journal.read_journal(self.partial / "journal.jsonl")[0]
        return rank_journal

    def _other_journals(self) -> list[Path]:
        return sorted(self.partial.glob("journal.*.jsonl"))

    def __exit__(self, *_: object) -> None:
        self.journal.close()
        if not self._has_progress():
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def _has_progress(self) -> bool:
        """True if any tensor is complete, so that another run can resume."""
        journals = [self.partial / "journal.jsonl", *self._other_journals()]
        return any(key != ("job",) for path in journals for key in journal.read_journal(path)[0])

    def check_space(self, needed: int) -> None:
        """Raises MachineError if the disk lacks room for `needed` bytes, less what an earlier run has written."""
        present = sum(file.stat().st_blocks * 512 for file in self.content.rglob("*") if file.is_file())
        needed = max(needed - present, 0) + SPARE_BYTES
        free = shutil.disk_usage(self.partial).free
        if needed > free:
            hint = "Free some space, or choose a target on another disk."
            raise MachineError(Problem(f"{self.target}", f"{needed:,} bytes free on its disk", f"{free:,}", hint))

    def discard(self) -> None:
        """Removes the staging folder: no run can resume from it."""
        self.journal.close()
        shutil.rmtree(self.partial)

    def commit(self, names: Iterable[str]) -> None:
        """Renames the content to the target, replacing it. names: its files, which are fsynced; others are removed."""
        complete = {self.content / name for name in names}
        for file in [file for file in self.content.rglob("*") if file.is_file() and file not in complete]:
            file.unlink()
        fsync_folders(self.content)
        replace_folder(self.content, self.target, _backup(self.target))
        self.discard()


def _backup(target: Path) -> Path:
    """Returns where the previous target stays while `commit` replaces it."""
    return target.parent / f".{target.name}.replaced"


def _lock_target(path: Path, target: Path) -> IO[str]:
    file = lock_file(path)
    if file is None:
        hint = "Wait for it, or end it."
        raise CheckpointError(Problem(f"{target}", "one process that writes it", "another one at work", hint))
    return file
