"""The samples of a blend of indexed datasets, through Megatron-core's own `GPTDataset` and `BlendedDataset`.

The order is the one that Megatron-core's builder gives (a test holds the two together). The builder itself is not
used: its barriers hang the other ranks when rank 0 fails, and a run that is killed while it writes leaves indices
that look whole.
"""

from __future__ import annotations

import json
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

from megatron_ligo.common.atomic_files import fsync_tree
from megatron_ligo.common.errors import DataError, Problem
from megatron_ligo.data.indexed_dataset import IndexedFiles
from megatron_ligo.distributed import mesh

# Megatron-core's surplus: each part of a weighted blend is built a little longer than its share.
BLEND_SURPLUS = 0.005


class PlaceholderTokenizer:
    """Megatron-core asks its config for a tokenizer; without resets at documents' ends it takes nothing from it."""

    eod = None
    vocab_size = None
    unique_identifiers = {"class": "tokens as they are"}


@dataclass(frozen=True)
class Blend:
    """One split's sources. weights None: each is read once, in proportion to its length."""

    split: Split
    pairs: tuple[IndexedFiles, ...]
    weights: tuple[float, ...] | None
    samples: int

    @property
    def name(self) -> str:
        return self.split.name


def open_blend(blend: Blend, seq_length: int, seed: int, cache_dir: Path) -> torch.utils.data.Dataset:
    if len(blend.pairs) > 1:
        # Megatron-core's blends ask for a rank.
        mesh.init_distributed()
    folder = cache_dir.resolve() / _cache_key(blend, seq_length, seed)
    ranks = mesh.all_ranks()
    ranks.run_on_rank_0(lambda: _build_index(blend, seq_length, seed, folder))
    ranks.run_on_all(lambda: _check_index(folder))
    return _build_datasets(blend, seq_length, seed, folder)


def _cache_key(blend: Blend, seq_length: int, seed: int) -> str:
    """Names what the indices depend on, the contents of the .idx files included."""
    sources = [[pair.prefix, pair.idx_digest] for pair in blend.pairs]
    key = [blend.name, sources, blend.weights, blend.samples, seq_length, seed]
    return xxhash.xxh3_64(json.dumps(key).encode()).hexdigest()


def _build_index(blend: Blend, seq_length: int, seed: int, folder: Path) -> None:
    """Builds the indices aside and renames them, so that a folder of that name is whole."""
    if folder.is_dir():
        return
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _build_datasets(blend, seq_length, seed, aside)
        fsync_tree(aside)
        aside.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another run was faster
            return
        hint = "Free some room, or choose another data.cache."
        raise DataError(Problem(str(folder), "a folder to keep the sample indices in", error, hint)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_index(folder: Path) -> None:
    """Megatron-core would run a program that stands in place of an array; each node may have a folder of its own."""
    if not folder.is_dir():
        hint = "Choose a data.cache that all nodes share."
        raise DataError(Problem(str(folder), "the folder that rank 0 has built", "nothing there", hint))
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise DataError(Problem(str(path), "a whole array", error, f"Remove the folder {folder}.")) from error


def _build_datasets(blend: Blend, seq_length: int, seed: int, folder: Path) -> torch.utils.data.Dataset:
    """Builds the indices into the folder, or takes those that are there."""
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
    everything = np.arange(len(tokens), dtype=np.int32)
    return GPTDataset(tokens, prefix, everything, samples, split, config)
