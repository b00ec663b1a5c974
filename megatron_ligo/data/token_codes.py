"""Makes the token codes of a growth, or of a start from scratch, from the training data."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron_ligo import arch as architectures
from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.arch.spec import Role
from megatron_ligo.checkpoint.reader import Reader
from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem
from megatron_ligo.common.folder_kinds import CODES, check_output
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.indexed_dataset import IndexedFiles, open_indexed_files
from megatron_ligo.data.pair_counts import count_pairs
from megatron_ligo.growth.codes.codes_file import write_codes
from megatron_ligo.growth.codes.spectral_codes import token_codes

log = logging.getLogger(__name__)

# The most tokens that are counted, unless a user says otherwise.
MAX_COUNTED = 50_000_000


def build_codes(config: RunConfig, large: ModelConfig, output: Path, source: Reader | None, max_tokens: int) -> dict:
    """Writes the codes of every token of `large` under `output`; returns their record: their cost, and from what.

    source: the small model; None makes codes for a start from scratch, as many as the large model has features.
    max_tokens: see `count_pairs`. LigoError for data, sizes or a folder that cannot be used.
    """
    check_output(output, CODES)
    if large.image_size is not None:
        raise ConfigError(Problem("small.path", "a model of text", large.arch, "Codes are those of tokens."))
    files = _open_data(config)
    embedding = None if source is None else _read_embedding(source, large.vocab_size)
    num_codes = large.hidden_size - (0 if embedding is None else embedding.shape[1])
    if num_codes < 1:
        hint = "Without new features in the residual stream there is nothing to encode."
        raise ConfigError(Problem("large.hidden_size", f"more than {embedding.shape[1]}", large.hidden_size, hint))
    began = time.monotonic()
    pairs, num_tokens = count_pairs(files, large.vocab_size, max_tokens, os.cpu_count() or 1)
    log.info("%d distinct pairs in %d tokens", len(pairs.count), num_tokens)
    result = token_codes(pairs, num_codes, config.operator.seed, embedding)
    record = {
        "vocab_size": large.vocab_size,
        "codes": num_codes,
        "orthogonal_to": 0 if embedding is None else embedding.shape[1],
        "tokens": num_tokens,
        "pairs": len(pairs.count),
        "flops": result.flops,
        "seconds": round(time.monotonic() - began, 1),
        "seed": config.operator.seed,
        "data": {file.prefix: file.idx_digest for file in files},
    }
    return write_codes(result.codes, output, record)


def _read_embedding(source: Reader, vocab_size: int) -> Tensor:
    """Reads the old embedding, (V, D1) fp32. Tokens that the small model lacks have the mean of the others."""
    table = source.read(architectures.get(source.model_config.arch).get(Role.WORD_EMBEDDING).key).float()
    return torch.cat([table, table.mean(dim=0).expand(max(vocab_size - len(table), 0), -1)])


def _open_data(config: RunConfig) -> list[IndexedFiles]:
    errors = ErrorCollector("data", DataError)
    prefixes = [entry for entry in config.data.train if isinstance(entry, str)]
    if not prefixes:
        errors.add("data.train", "prefixes of .bin/.idx pairs", "none", "Create them with tools/prepare_data.py.")
    files = [open_indexed_files(prefix, errors) for prefix in prefixes]
    errors.raise_if_any()
    return files
