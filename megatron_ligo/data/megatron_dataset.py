"""Samples of a blend of indexed datasets, read through Megatron-core's `GPTDataset` and `BlendedDataset`.

The sample order is that of Megatron-core's own builder, which a test verifies. The builder itself is not used: its
barriers hang the other ranks when rank 0 fails, and a killed run leaves partial indices that look complete.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split, normalize

from megatron_ligo.common.atomic_files import fsync_tree, read_json, write_json
from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.common.file_digest import digest_file, hash_json, is_intact, list_files, seal
from megatron_ligo.data.indexed_dataset import IndexedFiles
from megatron_ligo.distributed import mesh
from megatron_ligo.distributed.digest_cache import DigestCache

log = logging.getLogger(__name__)

INDEX_RECORD = "indices.json"
# Megatron-core builds each dataset of a weighted blend longer than its share by this fraction.
BLEND_SURPLUS = 0.005


class PlaceholderTokenizer:
    """Required by Megatron-core's config; unused, because positions and masks are not reset at document ends."""

    eod = None
    vocab_size = None
    unique_identifiers = {"class": "tokens as they are"}


@dataclass(frozen=True)
class Blend:
    """The sources of one split. weights: their shares of the samples; None: each is read once, in full."""

    split: Split
    pairs: tuple[IndexedFiles, ...]
    weights: tuple[float, ...] | None
    samples: int

    @property
    def name(self) -> str:
        return self.split.name


def open_blend(blend: Blend, seq_length: int, seed: int, cache_dir: Path) -> tuple[torch.utils.data.Dataset, Path, str]:
    """Opens a blend; rank 0 builds its sample indices under `cache_dir` first, unless they are there. Collective.

    Indices that are not as they were built are built again. Returns the dataset, the folder of its indices and the
    digest of their content, which does not depend on the paths of the data.
    """
    if len(blend.pairs) > 1:
        # BlendedDataset asks torch.distributed for its rank.
        mesh.init_distributed()
    folder = cache_dir.resolve() / _cache_key(blend, seq_length, seed)
    ranks = mesh.all_ranks()
    ranks.run_on_rank_0(lambda: _build_index(blend, seq_length, seed, folder))
    ranks.run_on_all(lambda: _check_shared(folder))
    digests = DigestCache(ranks).digest_folder(folder)
    if not ranks.run_on_all(lambda: _is_as_built(folder, digests)):
        log.warning("%s: the sample indices are not as they were built: they are built again", folder)
        ranks.run_on_rank_0(lambda: shutil.rmtree(folder))
        ranks.run_on_rank_0(lambda: _build_index(blend, seq_length, seed, folder))
        digests = DigestCache(ranks).digest_folder(folder)
    content = sorted(digest for name, digest in digests.items() if name.endswith(".npy"))
    return _build_datasets(blend, seq_length, seed, folder), folder, hash_json(content)


def _cache_key(blend: Blend, seq_length: int, seed: int) -> str:
    """Returns a digest of everything the indices depend on, including the content of the .idx files."""
    sources = [[pair.prefix, pair.idx_digest] for pair in blend.pairs]
    key = [blend.name, sources, blend.weights, blend.samples, seq_length, seed]
    return xxhash.xxh3_64(json.dumps(key).encode()).hexdigest()


def _build_index(blend: Blend, seq_length: int, seed: int, folder: Path) -> None:
    """Builds the indices in a temporary folder and renames it: a folder of the final name is complete."""
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _build_datasets(blend, seq_length, seed, temporary)
        digests = {str(path.relative_to(temporary)): digest_file(path) for path in list_files(temporary)}
        write_json(temporary / INDEX_RECORD, seal({"digests": digests}))
        fsync_tree(temporary)
        temporary.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another run was faster
            return
        hint = "Free disk space, or choose another data.cache."
        raise DataError(Problem(str(folder), "a writable folder for sample indices", error, hint)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_shared(folder: Path) -> None:
    """Raises DataError unless this rank sees the indices."""
    if not folder.is_dir():
        hint = "Choose a data.cache on a file system that all nodes share."
        raise DataError(Problem(str(folder), "the folder that rank 0 built", "no such folder", hint))


def _is_as_built(folder: Path, digests: dict[str, str]) -> bool:
    """True if the folder holds the files that its record lists, and all indices are plain arrays.

    Megatron-core loads them with pickle enabled: a tampered file would execute code.
    """
    try:
        record = read_json(folder / INDEX_RECORD)
        if not is_intact(record) or {**digests, INDEX_RECORD: ""} != {**record["digests"], INDEX_RECORD: ""}:
            return False
        for path in folder.glob("*.npy"):
            np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, KeyError, TypeError, AttributeError):
        return False
    return True


def _build_datasets(blend: Blend, seq_length: int, seed: int, folder: Path) -> torch.utils.data.Dataset:
    """Opens the datasets with the indices in `folder`, which Megatron-core builds if they are missing."""
    prefixes = [pair.prefix for pair in blend.pairs]
    per_split: list = [None] * len(Split)
    per_split[blend.split.value] = (prefixes, blend.weights)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=per_split,
        path_to_cache=str(folder),
        tokenizer=PlaceholderTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    if len(prefixes) == 1:
        return _build_gpt_dataset(prefixes[0], blend.samples, blend.split, config)
    if blend.weights is None:
        parts = [_build_gpt_dataset(prefix, None, blend.split, config) for prefix in prefixes]
        return BlendedDataset(parts, [len(part) for part in parts], blend.samples, config)
    shares = [math.ceil(blend.samples * weight) for weight in normalize(list(blend.weights))]
    parts = [
        _build_gpt_dataset(prefix, math.ceil(share * (1 + BLEND_SURPLUS)), blend.split, config)
        for prefix, share in zip(prefixes, shares, strict=True)
    ]
    return BlendedDataset(parts, normalize(list(blend.weights)), sum(shares), config)


def _build_gpt_dataset(prefix: str, samples: int | None, split: Split, config: GPTDatasetConfig) -> GPTDataset:
    tokens = IndexedDataset(prefix)
    all_documents = np.arange(len(tokens), dtype=np.int32)
    return GPTDataset(tokens, prefix, all_documents, samples, split, config)
