"""manifest.json: the contents of a checkpoint folder that this program wrote, with a digest of every tensor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint.reader import WEIGHT
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.common.file_digest import SEAL, hash_bytes, is_intact, seal

MANIFEST = "manifest.json"
# Version 1 has no digests of whole files.
VERSION, VERSIONS = 2, (1, 2)
LIBRARIES = ("torch", "safetensors", "gguf", "xxhash", "deepspeed", "megatron-core")


@dataclass(frozen=True)
class Manifest:
    """The record of one conversion.

    tensors: canonical key -> {kind: {shape, dtype, digest}}; kind is "weight" or one of Adam's moments, and the digest
    (xxh3, 128 bits) covers the canonical bytes in row-major order. files: name -> bytes. digests: name -> digest of the
    whole file. job: digest of the request. left_behind: contents of the source that the format does not store.
    accepted: keys of the source's config that this program does not know and that the user let through, with their
    values.
    """

    format: str
    dims: ModelConfig
    step: int
    layout: dict
    job: str
    source: dict
    tensors: dict[str, dict[str, dict]]
    files: dict[str, int] = field(default_factory=dict)
    left_behind: list[str] = field(default_factory=list)
    accepted: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    def to_json(self) -> dict:
        return seal(asdict(self))


def library_versions() -> dict[str, str]:
    """Returns the installed versions of the libraries that read or write checkpoints."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def load_manifest(folder: Path) -> Manifest:
    """Reads a folder's manifest. Raises CheckpointError if it is missing or unreadable."""
    path = folder / MANIFEST
    try:
        data = read_json(path)
        intact, seal_digest = is_intact(data), data.pop(SEAL, None)
        dims = ModelConfig.from_json(data.pop("dims"))
        manifest = Manifest(dims=dims, **data)
        if not all(isinstance(table, dict) for table in (manifest.files, manifest.digests, manifest.tensors)):
            raise TypeError("files, digests and tensors")
    except FileNotFoundError:
        raise CheckpointError(
            Problem(f"{path}", "a manifest", "nothing there", "Only folders that this program wrote have one.")
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(Problem(f"{path}", "a manifest that this program wrote", f"{error!r}")) from None
    if manifest.version not in VERSIONS:
        raise CheckpointError(Problem(f"{path}", f"version {VERSION}", manifest.version))
    if manifest.version > 1 and not intact:
        raise CheckpointError(Problem(f"{path}", f"its own digest, {seal_digest}", "other content"))
    if manifest.version > 1 and manifest.digests.keys() != manifest.files.keys():
        raise CheckpointError(Problem(f"{path}", "a digest of every file", sorted(manifest.digests)))
    return manifest


def digest_recorded_weights(manifest: Manifest) -> str:
    """Returns the digest of all canonical weights, as `content.read_weights_digest` reads them from the files."""
    lines = [f"{key} {kinds[WEIGHT]['digest']}" for key, kinds in sorted(manifest.tensors.items())]
    return hash_bytes("\n".join(lines).encode())
