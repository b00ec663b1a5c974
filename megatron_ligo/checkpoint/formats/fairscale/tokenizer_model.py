"""The tokenizer.model of Meta's releases: a sentencepiece model (Llama 1 and 2), or a table of byte pairs (Llama 3)."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_ligo.checkpoint import model_record

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
# Without this, transformers takes a sentencepiece model for one that puts no space before the first word.
SETTINGS = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}


def collect_files(folder: Path, aside: Path) -> tuple[Path, ...]:
    """What conversions carry along: what lies beside the weights, the tokenizer of the folder above (Llama 1 and 2
    come with one for all sizes) if there is none, and, made in `aside`, what transformers asks for with sentencepiece.
    """
    found = list(model_record.find_carried_files(folder))
    above = folder.absolute().parent / MODEL
    if not (folder / MODEL).is_file() and above.is_file():
        found.append(above)
    names = {file.name: file for file in found}
    if MODEL in names and CONFIG not in names and _load_sentencepiece(names[MODEL]):
        (aside / CONFIG).write_text(json.dumps(SETTINGS, indent=2) + "\n", encoding="utf-8")
        found.append(aside / CONFIG)
    return tuple(found)


def read_token_ids(files: tuple[Path, ...]) -> dict[str, int]:
    """What a sentencepiece model among the files says of the special tokens, as Hugging Face configs call them."""
    model = next((_load_sentencepiece(file) for file in files if file.name == MODEL), None)
    if model is None:
        return {}
    ids = {"bos_token_id": model.bos_id(), "eos_token_id": model.eos_id(), "pad_token_id": model.pad_id()}
    return {name: number for name, number in ids.items() if number >= 0}


def _load_sentencepiece(file: Path):
    """The sentencepiece model in a file, or None."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        return None
