"""The file of token codes: `codes.safetensors` (V, K), fp32, of root mean square 1, and `codes.json`, its record.

Legend: V tokens, K codes of a token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_ligo.common.atomic_files import publish_file, write_json
from megatron_ligo.common.errors import CheckpointError, Problem
from megatron_ligo.common.file_digest import digest_file, seal

TENSORS, RECORD, NAME = "codes.safetensors", "codes.json", "codes"


def write_codes(codes: Tensor, folder: Path, record: dict) -> dict:
    """Writes codes, (V, K) fp32, and their record, each atomically, the record last; returns the record as written."""
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / f".{TENSORS}.new"
    staged.touch()
    mode = staged.stat().st_mode
    # save_file replaces the file by one with owner-only permissions.
    save_file({NAME: codes.float().contiguous()}, staged)
    staged.chmod(mode)
    digest = digest_file(staged)
    publish_file(staged, folder / TENSORS)
    sealed = seal({**record, "tensors_digest": digest})
    write_json(folder / RECORD, sealed)
    return sealed


def read_codes(folder: Path, vocab_size: int, num_codes: int) -> Tensor:
    """Reads the first `num_codes` codes of each token, (vocab_size, num_codes), fp32; only these are read.

    CheckpointError if the folder holds none, or codes of another vocabulary, or too few.
    """
    path = folder / TENSORS
    hint = "Run `ligo codes` with this config, and name its output."
    try:
        with safe_open(path, framework="pt") as file:
            stored = file.get_slice(NAME)
            size = tuple(stored.get_shape())
            if len(size) != 2 or size[0] != vocab_size or size[1] < num_codes:
                expected = f"codes of {vocab_size} tokens, at least {num_codes} each"
                raise CheckpointError(Problem(f"{path}", expected, f"shape {size}", hint))
            codes = stored[:, :num_codes]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(Problem(f"{path}", "token codes", f"{error}", hint)) from error
    if not bool(torch.isfinite(codes).all()):
        raise CheckpointError(Problem(f"{path}", "finite codes", "NaN or Inf", hint))
    return codes.float()
