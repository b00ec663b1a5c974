"""What a checkpoint whose format has no config needs beside it: dims.json, and the tokenizer's files.

Every writer but Hugging Face's calls `write`; its reader calls `read` and `files_beside`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_ligo.arch.dims import Dims
from megatron_ligo.errors import CheckpointError, ConfigError, message
from megatron_ligo.formats import hf_config
from megatron_ligo.formats.base import Reader
from megatron_ligo.formats.output import Output

RECORD = "dims.json"
VERSION = 1
# Tokenizers, generation settings, chat templates, licences: what makes a folder of weights a model to use.
BESIDE = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def files_beside(folder: Path) -> tuple[Path, ...]:
    """The files of a folder that conversions carry along."""
    return tuple(sorted({file for pattern in BESIDE for file in folder.glob(pattern) if file.is_file()}))


def write(source: Reader, out: Output) -> None:
    """Writes the record and copies the carried files into the output's root."""
    out.json(RECORD, {"version": VERSION, "dims": source.dims.to_json(), "carried": dict(source.carried)})
    for file in source.files:
        out.copy(file)


def find(folder: Path) -> tuple[Dims, Mapping[str, object]] | None:
    """Sizes and carried config keys that a folder states: our record, or a Hugging Face config.json; else None."""
    if (folder / RECORD).is_file():
        return _own(folder / RECORD)
    path = folder / hf_config.CONFIG
    if path.is_file():
        config = hf_config.load(path)
        return hf_config.dims_of(config, str(path)), hf_config.carried_of(config)
    return None


def read(folder: Path) -> tuple[Dims, Mapping[str, object]]:
    """As `find`, where nothing else can state the sizes. Raises CheckpointError if neither file is there."""
    found = find(folder)
    if found is None:
        do = "Put the model's Hugging Face config.json there."
        raise CheckpointError(
            message(f"{folder}", f"{RECORD} or {hf_config.CONFIG} with the model's sizes", "none", do)
        )
    return found


def _own(path: Path) -> tuple[Dims, Mapping[str, object]]:
    data = hf_config.load(path)
    try:
        if data["version"] != VERSION:
            raise CheckpointError(message(f"{path}", f"version {VERSION}", data["version"]))
        return Dims.from_json(data["dims"]), dict(data["carried"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(message(f"{path}", "a record that we wrote", f"{error!r}")) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
