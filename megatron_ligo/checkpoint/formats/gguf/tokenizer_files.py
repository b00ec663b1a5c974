"""Writes the tokenizer of a GGUF file as Hugging Face files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, processors

from megatron_ligo.checkpoint.formats.gguf.byte_level_bpe import build_byte_level_bpe
from megatron_ligo.checkpoint.formats.gguf.sentence_pieces import build_sentence_pieces
from megatron_ligo.checkpoint.formats.gguf.tokenizer_keys import (
    NAMED_TEMPLATE,
    ROLES,
    TokenTable,
    is_text,
    is_token_id,
    read_token_table,
)
from megatron_ligo.checkpoint.source_keys import describe_value
from megatron_ligo.common.errors import CheckpointError, ErrorCollector, panics_as_exceptions

MODEL, TEMPLATE = "tokenizer.ggml.model", "tokenizer.chat_template"
BYTE_LEVEL, SENTENCE_PIECES = "gpt2", "llama"
# llama.cpp's words for a file without one.
NO_TOKENIZER = (None, "none", "no_vocab")
OTHER_KINDS = {
    "bert": "'bert', WordPiece",
    "t5": "'t5', sentencepiece's unigram model",
    "rwkv": "'rwkv'",
    "plamo2": "'plamo2'",
}


def write_tokenizer(metadata: Mapping[str, object], vocab_size: int, folder: Path) -> tuple[Path, ...]:
    """Writes the files of a tokenizer into a folder and returns them; none if the file has no tokenizer.

    Raises CheckpointError with everything that is not understood: the tokenizer must give the ids of the original.
    """
    errors = ErrorCollector("the tokenizer", CheckpointError)
    kind = metadata.get(MODEL)
    if kind in NO_TOKENIZER and "tokenizer.ggml.tokens" not in metadata:
        return ()
    if kind not in (BYTE_LEVEL, SENTENCE_PIECES):
        known = OTHER_KINDS.get(kind) if isinstance(kind, str) else None
        errors.add(MODEL, f"{BYTE_LEVEL} or {SENTENCE_PIECES}", known or describe_value(kind))
        errors.raise_if_any()
    table = read_token_table(metadata, vocab_size, errors)
    errors.raise_if_any()
    begins = True
    try:
        with panics_as_exceptions():
            if kind == BYTE_LEVEL:
                tokenizer, begins = build_byte_level_bpe(metadata, table, errors) or (None, False)
            else:
                tokenizer = build_sentence_pieces(table, errors)
            if tokenizer:
                _surround(tokenizer, table, begins, errors)
    except Exception as error:  # the library raises bare Exception
        errors.add("the tokenizer", "one that the tokenizers package builds", error)
    errors.raise_if_any()
    _save(tokenizer, table, metadata, folder)
    return tuple(sorted(file for file in folder.iterdir() if file.is_file()))


def describe_left_out(metadata: Mapping[str, object], vocab_size: int) -> tuple[str, ...]:
    """Lists what of a tokenizer, beyond the tokenizer itself, no file that is written holds."""
    left_out = [
        f"chat template {describe_value(key.removeprefix(NAMED_TEMPLATE))}"
        for key in metadata
        if key.startswith(NAMED_TEMPLATE)
    ]
    template = metadata.get(TEMPLATE)
    if template is not None and not _is_template(template):
        left_out.append(f"chat template ({TEMPLATE} is no text: {describe_value(template)})")
    for key in ROLES.values():
        if key in metadata and not is_token_id(metadata[key], vocab_size):
            left_out.append(f"special token ({key} is no id of a token: {describe_value(metadata[key])})")
    return tuple(left_out)


def _is_template(template: object) -> bool:
    return isinstance(template, str) and is_text(template)


def _surround(tokenizer: Tokenizer, table: TokenTable, begins: bool, errors: ErrorCollector) -> None:
    """Lets sequences begin with bos and end with eos, as the file says or as llama.cpp does for its kind."""
    wanted = {
        "bos_token": begins if table.begins is None else table.begins,
        "eos_token": bool(table.ends),
    }
    for role, used in wanted.items():
        if used and role not in table.roles:
            errors.add(ROLES[role], "the id of the token that is added to each sequence", "none")
    if errors.problems or not any(wanted.values()):
        return
    tokens = {role: table.tokens[table.roles[role]] for role, used in wanted.items() if used}
    first, last = ([tokens[role]] if role in tokens else [] for role in wanted)
    special = [(token, table.roles[role]) for role, token in tokens.items()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*first, "$A:0", *last],
        pair=[*first, "$A:0", *last, *(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
        special_tokens=special,
    )


def _save(tokenizer: Tokenizer, table: TokenTable, metadata: Mapping[str, object], folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    roles = {role: table.tokens[index] for role, index in table.roles.items()}
    template = metadata.get(TEMPLATE)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=template if _is_template(template) else None,
        **roles,
    )
    wrapped.save_pretrained(folder)
    # A class that transformers 4 knows too; without the keys that state where the tokenizer was read.
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only", "backend"):
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
