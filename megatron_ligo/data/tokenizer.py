"""Tokenizers of a folder: Hugging Face's tokenizer.json, or sentencepiece's tokenizer.model. Neither runs code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import xxhash

from megatron_ligo.common.atomic_files import read_json
from megatron_ligo.common.errors import DataError, Problem

HF_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "tokenizer.model"
# Datasets have int32.
MAX_VOCAB_SIZE = 1 << 31
# Tokens that end a document, in the order in which they are looked for. A chat model's eos token ends a turn:
# what its pretraining used comes first.
PRETRAINING_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>")
FALLBACK_EOD_NAMES = ("</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """encode(text) gives token ids without special ones; eod is the id that ends a document."""

    encode: Callable[[str], list[int]]
    vocab_size: int
    eod: int
    digest: str
    files: tuple[Path, ...]


def find_tokenizer_file(path: str | Path) -> Path:
    """The tokenizer's own file: `path` itself, or in the folder `path`."""
    path = Path(path)
    candidates = [path] if path.is_file() else [path / HF_FILE, path / SENTENCEPIECE_FILE]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".json", ".model"):
            return candidate
    raise DataError(Problem(str(path), f"a folder with {HF_FILE} or {SENTENCEPIECE_FILE}", "neither"))


def digest_tokenizer(path: str | Path) -> str:
    """xxh3-64 (hex) of the tokenizer's own file."""
    return xxhash.xxh3_64(find_tokenizer_file(path).read_bytes()).hexdigest()


def load_tokenizer(path: str | Path, eod: str = "") -> Tokenizer:
    """The tokenizer of a folder or file. eod: the token that ends a document; empty: the folder's own."""
    file = find_tokenizer_file(path)
    return _load_sentencepiece(file, eod) if file.suffix == ".model" else _load_hf(file, eod)


def read_special_tokens(path: str | Path) -> dict[str, int]:
    """The ids of the special tokens of a Hugging Face tokenizer, by name; sentencepiece knows of none."""
    file = find_tokenizer_file(path)
    if file.suffix == ".model":
        return {}
    added = _HfReader(file).get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _HfReader(file: Path):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(Problem(str(file), "a Hugging Face tokenizer", error)) from error


def _load_hf(file: Path, eod: str) -> Tokenizer:
    inner = _HfReader(file)
    inner.no_truncation()
    inner.no_padding()
    names = [eod] if eod else [*PRETRAINING_EOD_NAMES, *_read_eos_names(file.parent), *FALLBACK_EOD_NAMES]
    end = next((inner.token_to_id(name) for name in names if inner.token_to_id(name) is not None), None)
    if end is None:
        raise DataError(Problem(str(file), "a token that ends a document", f"none of {names}", "Name it with --eod."))
    # Ids may have holes: the vocabulary reaches to the largest.
    vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    if vocab_size > MAX_VOCAB_SIZE:
        raise DataError(Problem(str(file), f"no token's number above {MAX_VOCAB_SIZE - 1}", vocab_size - 1))
    files = tuple(path for path in sorted(file.parent.glob("*token*.json")) if path != file)
    return Tokenizer(
        lambda text: inner.encode(text, add_special_tokens=False).ids,
        vocab_size,
        end,
        digest_tokenizer(file),
        (file, *files),
    )


def _read_eos_names(folder: Path) -> list[str]:
    """The end token that tokenizer_config.json names, if it does."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    try:
        named = read_json(path).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(Problem(str(path), "a table in JSON", error)) from error
    named = named.get("content") if isinstance(named, dict) else named
    return [named] if isinstance(named, str) else []


def _load_sentencepiece(file: Path, eod: str) -> Tokenizer:
    import sentencepiece

    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise DataError(Problem(str(file), "a sentencepiece model", error)) from error
    end = inner.piece_to_id(eod) if eod else inner.eos_id()
    if end < 0 or end == inner.unk_id():
        raise DataError(Problem(str(file), "a token that ends a document", eod or "none", "Name it with --eod."))
    return Tokenizer(inner.encode, inner.vocab_size(), end, digest_tokenizer(file), (file,))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-pair sentencepiece model on the texts; the same texts give the same file."""
    import sentencepiece

    # Into memory: its own writing is silent where the disk is full, and puts the folder's name into the file.
    made = BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_split_lines(texts),
            model_writer=made,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.9995,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            user_defined_symbols=["\n"],
            # Indentation: 3.6 bytes a token on Python's sources with them, 2.1 without.
            allow_whitespace_only_pieces=True,
            # Its default leaves out longer lines without a word.
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        hint = "Choose another vocabulary size, or give more text."
        raise DataError(Problem("--train-sentencepiece", "a vocabulary that the texts fill", error, hint)) from error
    (folder / SENTENCEPIECE_FILE).write_bytes(made.getvalue())


def _split_lines(texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        yield from (line for line in text.split("\n") if line)
