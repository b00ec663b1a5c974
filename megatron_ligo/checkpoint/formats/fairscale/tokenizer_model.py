"""tokenizer.model of Meta's releases: a sentencepiece model (Llama 1 and 2) or a table of byte pairs (Llama 3)."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ligo.checkpoint import model_record

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
# Without these, transformers puts no space before the first word of a sentencepiece model.
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}


def collect_files(folder: Path, scratch: Path) -> tuple[Path, ...]:
    """Returns the files that conversions copy, with the parent folder's tokenizer if this folder has none.

    Llama 1 and 2 share one tokenizer for all sizes. The settings that transformers needs for sentencepiece are written
    into `scratch`.
    """
    carried = list(model_record.find_carried_files(folder))
    above = folder.absolute().parent / MODEL
    if not (folder / MODEL).is_file() and above.is_file():
        carried.append(above)
    names = {file.name: file for file in carried}
    if MODEL in names and CONFIG not in names and _load_sentencepiece(names[MODEL]):
        (scratch / CONFIG).write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")
        carried.append(scratch / CONFIG)
    return tuple(carried)


def read_token_ids(files: tuple[Path, ...]) -> dict[str, int]:
    """Returns the special token ids of a sentencepiece model among the files, under Hugging Face's names."""
    model = next((_load_sentencepiece(file) for file in files if file.name == MODEL), None)
    if model is None:
        return {}
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    return {name: number for name, number in ids.items() if number >= 0}


def _load_sentencepiece(file: Path):
    """Loads a sentencepiece model; None if the file is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        return None
