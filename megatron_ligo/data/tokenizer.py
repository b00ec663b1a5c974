"""Loads tokenizers: Hugging Face's files or sentencepiece's tokenizer.model. Loading executes no code.

A folder's tokenizer.json comes first, then tokenizer.model, then vocab.json with merges.txt, then vocab.txt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_ligo.common import hub_models
from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import DataError, Problem, panics_as_exceptions
from megatron_ligo.data.vocabulary_files import (
    VOCABULARIES,
    build_from_vocabulary,
    digest_vocabulary,
    list_vocabulary_files,
)

# The folder of the tokenizer that is trained with prepared data.
TOKENIZER_FOLDER = "tokenizer"
HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
# Datasets store token ids as int32.
MAX_VOCAB_SIZE = 1 << 31
# Names of the end-of-document token, in order of preference. The token that pretraining used comes first, because a
# chat model's eos token ends a turn.
PRETRAINING_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>")
FALLBACK_EOD_NAMES = ("</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer(ABC):
    """A loaded tokenizer, which other processes can receive. eod, eod_text: id and text of the token that ends a
    document. inner: the library's object."""

    inner: Any
    vocab_size: int
    eod: int
    eod_text: str
    digest: str
    files: tuple[Path, ...]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a text, without special tokens."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids (tokens,) of a text and each token's first and last character (tokens, 2)."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Returns the text of token ids."""


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Raises DataError for a fault of the library: a pattern that needs too many steps, a vocabulary without [UNK]."""
    try:
        with panics_as_exceptions():
            yield
    except Exception as error:
        # Other faults are bare Exceptions.
        if type(error) not in (Exception, RuntimeError):
            raise
        hint = "Check its unknown token, and its pre_tokenizer: a pattern may need too many steps on a text."
        raise DataError(Problem("the tokenizer", "the ids of each text, and their text", f"{error}", hint)) from error


class HuggingFaceTokenizer(Tokenizer):
    def encode(self, text: str) -> list[int]:
        # Without offsets, which take most of the memory.
        with _panics_as_errors():
            return self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        with _panics_as_errors():
            encoding = self.inner.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: list[int]) -> str:
        with _panics_as_errors():
            return self.inner.decode(ids, skip_special_tokens=False)


class SentencepieceTokenizer(Tokenizer):
    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self.inner.encode_as_offset_mapping(text)
        return np.array(encoding["ids"], np.int32), np.array(encoding["offsets"], np.int64).reshape(-1, 2)

    def decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids)


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer's file: `path` itself, or the one in the folder `path`. DataError if there is none.

    The name of a model on the Hugging Face hub stands for its folder; a folder of prepared data, for the tokenizer
    that was trained with it.
    """
    path = hub_models.find_model(path)
    names = (HF_FILE, SENTENCEPIECE_FILE, *VOCABULARIES)
    folders = (path, path / TOKENIZER_FOLDER)
    candidates = [path] if path.is_file() else [folder / name for folder in folders for name in names]
    for candidate in candidates:
        complete = all((candidate.parent / name).is_file() for name in VOCABULARIES.get(candidate.name, ()))
        known = candidate.name in VOCABULARIES or candidate.suffix in (".json", ".model")
        if candidate.is_file() and complete and known:
            return candidate
    expected = f"a folder with {HF_FILE}, {SENTENCEPIECE_FILE}, vocab.json and merges.txt, or vocab.txt"
    if not path.exists():
        raise DataError(hub_models.missing_path(path, expected))
    raise DataError(Problem(str(path), expected, "none of them"))


def choose_tokenizers(path: str, model_files: Iterable[Path]) -> tuple[Path, ...]:
    """Returns the files of the tokenizers that a model's data may have been prepared with.

    path: the tokenizer that the user names; empty: those among the files beside the model's weights. Without any, ().
    """
    if path:
        return (find_tokenizer_file(path),)
    return tuple(file for file in model_files if file.name in (HF_FILE, SENTENCEPIECE_FILE))


def digest_tokenizer(path: str | Path) -> str:
    """Returns the xxh3-64 (hex) of the tokenizer's file, or of all files that a vocabulary's tokenizer is made from."""
    file = find_tokenizer_file(path)
    if file.name in VOCABULARIES:
        return digest_vocabulary(file)
    return xxhash.xxh3_64(file.read_bytes()).hexdigest()


def load_tokenizer(path: str | Path, eod: str = "") -> Tokenizer:
    """Loads the tokenizer of a folder or file. eod: the end-of-document token; empty: the tokenizer's own."""
    file = find_tokenizer_file(path)
    return _load_sentencepiece(file, eod) if file.suffix == ".model" else _load_hf(file, eod)


def read_special_tokens(path: str | Path) -> dict[str, int]:
    """Returns the ids of a Hugging Face tokenizer's special tokens by name; none for sentencepiece."""
    file = find_tokenizer_file(path)
    if file.suffix == ".model":
        return {}
    added = _open_hf_tokenizer(file).get_added_tokens_decoder()
    return {token.content: token_id for token_id, token in added.items() if token.special}


def _open_hf_tokenizer(file: Path):
    import tokenizers

    if file.name in VOCABULARIES:
        return build_from_vocabulary(file)
    try:
        with panics_as_exceptions():
            return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(Problem(str(file), "a Hugging Face tokenizer", error)) from error


def _load_hf(file: Path, eod: str) -> Tokenizer:
    inner = _open_hf_tokenizer(file)
    inner.no_truncation()
    inner.no_padding()
    names = [eod] if eod else [*PRETRAINING_EOD_NAMES, *_read_eos_names(file.parent), *FALLBACK_EOD_NAMES]
    eod_text = next((name for name in names if inner.token_to_id(name) is not None), None)
    if eod_text is None:
        raise DataError(Problem(str(file), "an end-of-document token", f"none of {names}", "Name it with --eod."))
    # Ids may have gaps: the size follows from the largest id.
    vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    if vocab_size > MAX_VOCAB_SIZE:
        raise DataError(Problem(str(file), f"token ids up to {MAX_VOCAB_SIZE - 1}", vocab_size - 1))
    if file.name in VOCABULARIES:
        companions = list_vocabulary_files(file)
    else:
        companions = tuple(path for path in sorted(file.parent.glob("*token*.json")) if path != file)
    return HuggingFaceTokenizer(
        inner, vocab_size, inner.token_to_id(eod_text), eod_text, digest_tokenizer(file), (file, *companions)
    )


def _read_eos_names(folder: Path) -> list[str]:
    """Returns the eos token that a folder's settings name, as a list; empty if none does."""
    for path in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not path.is_file():
            continue
        try:
            token = read_json(path).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(Problem(str(path), "a JSON object", error)) from error
        name = token.get("content") if isinstance(token, dict) else token
        if isinstance(name, str):
            return [name]
    return []


def _load_sentencepiece(file: Path, eod: str) -> Tokenizer:
    import sentencepiece

    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError, UnicodeDecodeError) as error:  # of pieces that are no UTF-8
        raise DataError(Problem(str(file), "a sentencepiece model", error)) from error
    eod_id = inner.piece_to_id(eod) if eod else inner.eos_id()
    if eod_id < 0 or eod_id == inner.unk_id():
        raise DataError(Problem(str(file), "an end-of-document token", eod or "none", "Name it with --eod."))
    return SentencepieceTokenizer(
        inner, inner.vocab_size(), eod_id, inner.id_to_piece(eod_id), digest_tokenizer(file), (file,)
    )


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a sentencepiece BPE model into a folder; the same texts give the same file."""
    import sentencepiece

    # Trains in memory: sentencepiece ignores a full disk and stores the output path in the file.
    model = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_split_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            # Indentation tokens: 3.6 bytes per token on Python sources, 2.1 without.
            allow_whitespace_only_pieces=True,
            # The default silently skips longer lines.
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        hint = "Choose another vocabulary size, or provide more text."
        raise DataError(
            Problem("--train-sentencepiece", "a vocabulary size that fits the text", error, hint)
        ) from error
    (folder / SENTENCEPIECE_FILE).write_bytes(model.getvalue())


def _split_lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
