"""Loads tokenizers: Hugging Face's tokenizer.json or sentencepiece's tokenizer.model. Loading executes no code."""

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
# Datasets store token ids as int32.
MAX_VOCAB_SIZE = 1 << 31
# Names of the end-of-document token, in order of preference. The token that pretraining used comes first, because a
# chat model's eos token ends a turn.
PRETRAINING_EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>")
FALLBACK_EOD_NAMES = ("</s>", "<eos>", "[SEP]")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. encode: text to token ids, without special tokens. eod: id that ends a document."""

    encode: Callable[[str], list[int]]
    vocab_size: int
    eod: int
    digest: str
    files: tuple[Path, ...]


def find_tokenizer_file(path: str | Path) -> Path:
    """Returns the tokenizer's file: `path` itself, or the one in the folder `path`. DataError if there is none."""
    path = Path(path)
    candidates = [path] if path.is_file() else [path / HF_FILE, path / SENTENCEPIECE_FILE]
    for candidate in candidates:
        if candidate.is_file() and candidate.suffix in (".json", ".model"):
            return candidate
    raise DataError(Problem(str(path), f"a folder with {HF_FILE} or {SENTENCEPIECE_FILE}", "neither"))


def digest_tokenizer(path: str | Path) -> str:
    """Returns the xxh3-64 (hex) of the tokenizer's file."""
    return xxhash.xxh3_64(find_tokenizer_file(path).read_bytes()).hexdigest()


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

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(Problem(str(file), "a Hugging Face tokenizer", error)) from error


def _load_hf(file: Path, eod: str) -> Tokenizer:
    inner = _open_hf_tokenizer(file)
    inner.no_truncation()
    inner.no_padding()
    names = [eod] if eod else [*PRETRAINING_EOD_NAMES, *_read_eos_names(file.parent), *FALLBACK_EOD_NAMES]
    eod_id = next((inner.token_to_id(name) for name in names if inner.token_to_id(name) is not None), None)
    if eod_id is None:
        raise DataError(Problem(str(file), "an end-of-document token", f"none of {names}", "Name it with --eod."))
    # Ids may have gaps: the size follows from the largest id.
    vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1
    if vocab_size > MAX_VOCAB_SIZE:
        raise DataError(Problem(str(file), f"token ids up to {MAX_VOCAB_SIZE - 1}", vocab_size - 1))
    companions = tuple(path for path in sorted(file.parent.glob("*token*.json")) if path != file)
    return Tokenizer(
        lambda text: inner.encode(text, add_special_tokens=False).ids,
        vocab_size,
        eod_id,
        digest_tokenizer(file),
        (file, *companions),
    )


def _read_eos_names(folder: Path) -> list[str]:
    """Returns the eos token of tokenizer_config.json as a list; empty if the file or the key is missing."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return []
    try:
        token = read_json(path).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise DataError(Problem(str(path), "a JSON object", error)) from error
    name = token.get("content") if isinstance(token, dict) else token
    return [name] if isinstance(name, str) else []


def _load_sentencepiece(file: Path, eod: str) -> Tokenizer:
    import sentencepiece

    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise DataError(Problem(str(file), "a sentencepiece model", error)) from error
    eod_id = inner.piece_to_id(eod) if eod else inner.eos_id()
    if eod_id < 0 or eod_id == inner.unk_id():
        raise DataError(Problem(str(file), "an end-of-document token", eod or "none", "Name it with --eod."))
    return Tokenizer(inner.encode, inner.vocab_size(), eod_id, digest_tokenizer(file), (file,))


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
