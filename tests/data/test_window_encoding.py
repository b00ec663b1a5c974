"""Long texts are encoded in windows: the ids must be those of the whole text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_ligo.data.corpus import window_encoding
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

SPECIAL_TOKENS = ["<|endoftext|>", "[UNK]"]


def byte_level() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return inner


def metaspace() -> tokenizers.Tokenizer:
    """Llama 2's kind: no words, a space before the text, bytes for unknown characters."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Replace("▁", " ")
    return inner


def word_piece() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return inner


TRAINERS = {byte_level: trainers.BpeTrainer, metaspace: trainers.BpeTrainer, word_piece: trainers.WordPieceTrainer}


@pytest.fixture(scope="module", params=[*TRAINERS, "sentencepiece"], ids=lambda kind: getattr(kind, "__name__", kind))
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = list(DocumentSource((), python_docs=True, max_bytes=100_000))
    if request.param == "sentencepiece":
        train_sentencepiece(texts, 800, folder)
        return load_tokenizer(folder)
    inner = request.param()
    lines = [line for text in texts for line in text.split("\n")]
    trainer = TRAINERS[request.param](vocab_size=900, special_tokens=SPECIAL_TOKENS, show_progress=False)
    inner.train_from_iterator(lines, trainer)
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def code() -> str:
    return "\n".join(DocumentSource((), python_docs=True, max_bytes=60_000))


def mixed_scripts() -> str:
    random.seed(0)
    words = ["naïve", "中文字符", "🙂👩‍👩‍👧", "e\u0301tude", "<|endoftext|>", "   ", "\n\n", "Ünïcödé", "١٢٣", "plain"]
    return " ".join(random.choices(words, k=9000))


TEXTS = {
    "code": code,
    "mixed scripts": mixed_scripts,
    "one character": lambda: "a" * 20_011,
    "spaces": lambda: "x" + " " * 20_011 + "y",
    "runs": lambda: "".join(f"{'ab' * 1500} {'-' * 777}\n" for _ in range(5)),
    "no spaces": lambda: "".join(random.Random(1).choices("abcdefgh", k=20_000)),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
def test_windows_give_the_ids_of_the_whole_text(tokenizer, text, monkeypatch):
    monkeypatch.setattr(window_encoding, "WINDOW", 3000)
    monkeypatch.setattr(window_encoding, "OVERLAP", 400)
    assert len(text()) > 5 * window_encoding.WINDOW
    assert window_encoding.encode_text(tokenizer, text()).tolist() == tokenizer.encode(text())


def test_the_windows_stay_small(tokenizer, monkeypatch):
    """Memory is bounded by the longest text that the library gets at a time."""
    monkeypatch.setattr(window_encoding, "WINDOW", 3000)
    monkeypatch.setattr(window_encoding, "OVERLAP", 400)
    sizes = []
    whole = type(tokenizer).encode_with_offsets

    def encode_with_offsets(self: Tokenizer, text: str):
        sizes.append(len(text))
        return whole(self, text)

    monkeypatch.setattr(type(tokenizer), "encode_with_offsets", encode_with_offsets)
    window_encoding.encode_text(tokenizer, code())
    assert max(sizes) == 3000 and len(sizes) == 1 + -(-(len(code()) - 3000) // 2600)


def test_a_saved_tokenizer_reaches_other_processes(tokenizer):
    import pickle

    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("def f(x):\n  é") == tokenizer.encode("def f(x):\n  é")
    assert (copy.eod, copy.eod_text, copy.files) == (tokenizer.eod, tokenizer.eod_text, tokenizer.files)
    assert all(isinstance(path, Path) for path in copy.files)
