"""A checkpoint by its content: whether its files are those that were written, and the digests of its tensors.

The digest of the weights covers the canonical tensors: it is equal in every format that stores the same values.
"""

from __future__ import annotations

from pathlib import Path

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.io.digest import as_bytes
from megatron_ligo.checkpoint.manifest import MANIFEST, digest_recorded_weights, load_manifest
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT, Reader
from megatron_ligo.checkpoint.verify import ComparisonResult, check_manifest
from megatron_ligo.common.errors import Problem
from megatron_ligo.common.file_digest import hash_bytes
from megatron_ligo.distributed.agreement import SINGLE_RANK, RankGroup
from megatron_ligo.distributed.digest_cache import DigestCache


def read_weights_digest(source: Reader, ranks: RankGroup = SINGLE_RANK) -> str:
    """Reads all canonical weights, each rank its share, and returns their digest. Collective."""
    return _read_digest(source, WEIGHT, ranks)


def digest_weights(source: Reader, cache: DigestCache | None = None) -> str:
    """Like `read_weights_digest`, but returns the kept digest if the files have not changed."""
    cache = cache or DigestCache()
    if source.path is None:
        return read_weights_digest(source, cache.ranks)
    return cache.digest_content(source.path, "weights", lambda: _find_weights_digest(source, cache))


def digest_state(source: Reader, cache: DigestCache) -> str:
    """Returns the digest of the weights and, if there are any, of Adam's moments and step count. Collective."""
    weights = digest_weights(source, cache)
    if not source.has_moments or source.path is None:
        return weights
    moments = cache.digest_content(
        source.path, "moments", lambda: [_read_digest(source, kind, cache.ranks) for kind in MOMENTS]
    )
    return hash_bytes(" ".join([weights, *moments, f"{source.step}"]).encode())


def _read_digest(source: Reader, kind: str, ranks: RankGroup) -> str:
    keys = sorted(source.keys())
    with ranks.agree():
        own = [f"{key} {hash_bytes(as_bytes(source.read(key, kind)))}" for key in keys[ranks.rank :: ranks.world_size]]
    lines = sorted(line for part in ranks.all_gather(own) for line in part)
    return hash_bytes("\n".join(lines).encode())


def _find_weights_digest(source: Reader, cache: DigestCache) -> str:
    """Returns the digest that the manifest implies if its files are as it says; otherwise reads the weights."""
    folder = source.path
    if folder.is_dir() and (folder / MANIFEST).is_file():
        manifest = load_manifest(folder)
        # Another file might change what is read.
        complete = manifest.version > 1 and cache.digest_folder(folder).keys() <= {*manifest.files, MANIFEST}
        if complete and sorted(manifest.tensors) == sorted(source.keys()) and not find_damage(folder, cache):
            return digest_recorded_weights(manifest)
    return read_weights_digest(source, cache.ranks)


def find_damage(folder: Path, cache: DigestCache) -> list[Problem]:
    """Returns a problem for each file that is not as the folder's manifest states. Collective.

    The manifest of an earlier version has no digests of files: the digests of its tensors are compared.
    """
    manifest = load_manifest(folder)
    if manifest.version == 1:
        reader = formats.open(folder, manifest.format)
        return [Problem(f"{folder}", "what its manifest states", line) for line in check_manifest(reader).differences]
    actual, problems = cache.digest_folder(folder), []
    for name, expected in manifest.digests.items():
        if actual.get(name) != expected:
            found = f"digest {actual[name]}" if name in actual else "no such file"
            problems.append(Problem(f"{folder / name}", f"digest {expected}, as it was written", found))
    return problems


def compare_with_manifest(reader: Reader) -> ComparisonResult:
    """Compares every tensor and, if the manifest states their digests, every file."""
    result = check_manifest(reader)
    folder = reader.path if reader.path.is_dir() else reader.path.parent
    if load_manifest(folder).version > 1:
        result.differences += find_damage(folder, DigestCache(recompute=True))
    return result
