"""Tokenizers without a tokenizer.json: vocab.json with merges.txt (byte-level BPE), or vocab.txt (WordPiece).

transformers builds them as its AutoTokenizer does, so that the ids are the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import xxhash

from megatron_ligo.common.atomic_files import read_json, read_text
from megatron_ligo.common.errors import DataError, Problem, panics_as_exceptions

log = logging.getLogger(__name__)

MERGES, CONFIG, MODEL_CONFIG = "merges.txt", "tokenizer_config.json", "config.json"
# The vocabularies, and what each needs beside it.
VOCABULARIES = {"vocab.json": (MERGES,), "vocab.txt": ()}
SETTINGS = (CONFIG, "special_tokens_map.json", "added_tokens.json")
# GPT-2's form of a space, which marks a vocabulary of bytes.
BYTE_LEVEL_SPACE = "\u0120"
CLASS_HINT = (
    'Name its class in tokenizer_config.json, such as {"tokenizer_class": "BertTokenizer", "do_lower_case": false}.'
)


def list_vocabulary_files(file: Path) -> tuple[Path, ...]:
    """Returns the files beside a vocabulary that its tokenizer is made from."""
    names = [*VOCABULARIES[file.name], *SETTINGS, *([] if _named_class(file.parent) else [MODEL_CONFIG])]
    return tuple(file.parent / name for name in names if (file.parent / name).is_file())


def digest_vocabulary(file: Path) -> str:
    """Returns the xxh3-64 (hex) of a vocabulary and what is read beside it (of config.json: the model's type)."""
    hasher = xxhash.xxh3_64()
    for path in (file, *list_vocabulary_files(file)):
        content = _model_type(file.parent).encode() if path.name == MODEL_CONFIG else path.read_bytes()
        hasher.update(f"{path.name} {len(content)}\n".encode() + content)
    return hasher.hexdigest()


def build_from_vocabulary(file: Path) -> Any:
    """Returns the `tokenizers.Tokenizer` that transformers makes of a vocabulary. DataError if it cannot."""
    import transformers

    vocabulary = _read_vocabulary(file)
    options = {"trust_remote_code": False, "local_files_only": True}
    factory: Any = transformers.AutoTokenizer
    if not _named_class(file.parent) and not _model_type(file.parent):
        factory, extra = _choose_class(file, vocabulary)
        options |= extra
    try:
        with panics_as_exceptions():
            tokenizer = factory.from_pretrained(str(file.parent), **options)
        inner = tokenizer.backend_tokenizer
    except Exception as error:  # of many kinds, some without a type of their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(Problem(str(file), "a vocabulary that transformers can read", reason, CLASS_HINT)) from None
    built = inner.get_vocab(with_added_tokens=True)
    missing = [name for name, token_id in vocabulary.items() if built.get(name) != token_id]
    if missing:
        expected = f"a vocabulary that {type(tokenizer).__name__} reads whole"
        found = f"{len(missing)} of its {len(vocabulary)} tokens left out or renumbered, such as {missing[0]!r}"
        raise DataError(Problem(str(file), expected, found, CLASS_HINT))
    return inner


def _choose_class(file: Path, vocabulary: dict[str, int]) -> tuple[Any, dict[str, object]]:
    """Returns the class for a vocabulary beside which no file names one, and its options, from the tokens."""
    import transformers

    if file.name == "vocab.json":
        if not any(name.startswith(BYTE_LEVEL_SPACE) for name in vocabulary):
            raise DataError(Problem(str(file), "the tokens of a byte-level BPE, or its class", "neither", CLASS_HINT))
        log.warning("%s: no file names its class: read as GPT2Tokenizer.", file)
        return transformers.GPT2Tokenizer, {}
    if "[UNK]" not in vocabulary:
        raise DataError(Problem(str(file), "the tokens of WordPiece, or its class", "no [UNK]", CLASS_HINT))
    lower = not any(name != name.lower() for name in vocabulary if not name.startswith("["))
    case = "in lower case, as all its tokens are" if lower else "with case, as its tokens have capitals"
    log.warning("%s: no file names its class: read as BertTokenizer, %s.", file, case)
    return transformers.BertTokenizer, {"do_lower_case": lower}


def _read_vocabulary(file: Path) -> dict[str, int]:
    """Returns the id of each token of a vocabulary."""
    try:
        if file.suffix == ".json":
            vocabulary = read_json(file)
            if not isinstance(vocabulary, dict) or not all(type(value) is int for value in vocabulary.values()):
                raise ValueError("not a table of token ids")
            return vocabulary
        lines = read_text(file).split("\n")
        names = [line.rstrip("\r") for line in (lines[:-1] if not lines[-1] else lines)]
        return {name: index for index, name in enumerate(names)}
    except ValueError as error:
        raise DataError(Problem(str(file), "a vocabulary", error)) from None


def _named_class(folder: Path) -> str:
    return _read_key(folder / CONFIG, "tokenizer_class")


def _model_type(folder: Path) -> str:
    return _read_key(folder / MODEL_CONFIG, "model_type")


def _read_key(path: Path, key: str) -> str:
    """Returns a string under a key of a JSON file; empty if there is none."""
    if not path.is_file():
        return ""
    try:
        value = read_json(path).get(key)
    except (ValueError, AttributeError) as error:
        raise DataError(Problem(str(path), "a JSON object", error)) from error
    return value if isinstance(value, str) else ""
