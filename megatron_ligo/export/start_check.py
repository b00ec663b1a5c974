"""Whether the checkpoint that a pretraining starts from is as its writer left it."""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_ligo.checkpoint import manifest, run_record
from megatron_ligo.checkpoint.content import find_damage
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, Problem
from megatron_ligo.common.file_digest import hash_json
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export import provenance

log = logging.getLogger(__name__)


def find_start_damage(path: Path, source: Reader, cache: DigestCache) -> list[Problem]:
    """Returns a problem for each file that differs from what a manifest or a run's record states. Collective.

    path: a hand-off, or a checkpoint of any format; source: its Reader. A checkpoint of another program states nothing.
    """
    folder = source.path
    if folder is None or not folder.is_dir():
        return []
    problems: list[Problem] = []
    if (folder / manifest.MANIFEST).is_file():
        with cache.ranks.agree():
            version = manifest.load_manifest(folder).version
        if version > 1:
            problems += find_damage(folder, cache)
        else:
            log.warning("%s was written by an earlier version: its files are taken as they are", folder)
    problems += find_handoff_damage(path, folder)
    for place in (folder, folder.parent):
        if (place / run_record.RECORD).is_file():
            problems += find_checkpoint_damage(place, cache)
    return problems


def find_handoff_damage(path: Path, folder: Path) -> list[Problem]:
    """Returns a problem unless `folder`, one format of the hand-off at `path`, is the one that growth.json states."""
    record = provenance.read(path)
    if record is None or record["version"] == 1 or folder.name not in record.get("content", {}):
        return []
    expected = f"a conversion whose files have the digest {record['content'][folder.name]} ({provenance.RECORD_NAME})"
    try:
        actual = hash_json(manifest.load_manifest(folder).digests)
    except CheckpointError as error:
        return [Problem(f"{folder}", expected, f"{error}")]
    return [] if actual == record["content"][folder.name] else [Problem(f"{folder}", expected, actual)]


def find_checkpoint_damage(folder: Path, cache: DigestCache) -> list[Problem]:
    """Returns a problem for each file of a run's checkpoint that differs from its record. Collective."""
    with cache.ranks.agree():
        files = run_record.read_run_record(folder / run_record.RECORD)["files"]

    def compare() -> list[list[str]]:
        errors = ErrorCollector(f"{folder}", CheckpointError)
        ranks = cache.ranks
        for name in sorted(files)[ranks.rank :: ranks.world_size]:
            run_record.check_recorded_file(folder / name, files[name], errors)
        own = [[problem.where, problem.expected, problem.found] for problem in errors.problems]
        return [problem for part in ranks.all_gather(own) for problem in part]

    return [Problem(*parts) for parts in cache.digest_content(folder, "differences from its record", compare)]
