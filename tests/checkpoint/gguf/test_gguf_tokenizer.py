"""Tokenizers out of GGUF files: the ids of the original, or none at all, and the weights in any case."""

from __future__ import annotations

import io
import json
import logging
import random
import unicodedata
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from transformers import AutoTokenizer

from megatron_ligo.checkpoint import convert as converting
from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.gguf.byte_level_bpe import PRE_TOKENIZERS
from megatron_ligo.checkpoint.formats.gguf.tokenizer_files import write_tokenizer
from megatron_ligo.checkpoint.inspect import describe
from megatron_ligo.data.tokenizer import load_tokenizer
from tests.checkpoint.gguf.tiny_gguf import REMOVED, VOCAB, Type, write

GGML = "tokenizer.ggml."
SOURCE = Path(converting.__file__).read_text(encoding="utf-8")
TEXTS = [
    "Hello world", "  two  spaces\n\n\ttab 12345", "Grüße 世界 🎉 don't stop", " leading", "   three", "trailing  ",
    "\n", "\n\n x", "\t\tx", "no\u00a0break", "▁x", " ▁ ", "e\u0301 é", "\U0001d518\U0001d52b", "ﬁ ① ½", "", "x", " ", 
    "a" * 40,
    "ab" * 30, "==== ----    ", "\r\nwin\r\n", "I'll WE'LL can't DON'T", "1234567890 3.14 1,000", "٣٤٥ ⅷ", "हिन्दी भाषा",
    "日本語テキスト", "👩🏽‍💻", "\x00a\x01b", "<0x0A>", "--flag=value", "'s 'S 're 'Re", *SOURCE.split("\n"), SOURCE,
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Draws short texts in which pieces overlap, and of rare characters."""
    draw = random.Random(0)
    texts = []
    for alphabet in ("ab c\n▁é世🎉'1.", "a b", "".join(map(chr, (*range(32, 127), *range(160, 800))))):
        texts += ["".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(count)]
    return texts


def train(user_defined: tuple[str, ...] = (), **options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    settings = {
        "vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 0.9995, "minloglevel": 2, "num_threads": 1,
        "user_defined_symbols": list(user_defined),
    }  # fmt: skip
    sentences = [line for line in SOURCE.split("\n") if line] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, **{**settings, **options}
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def pieces_of(model: sentencepiece.SentencePieceProcessor, user_defined: tuple[str, ...] = ()) -> dict:
    """Returns the metadata that llama.cpp's converter writes for a sentencepiece model."""
    size = model.vocab_size()
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6), (model.is_unused, 5))
    types = [next((number for test, number in kinds if test(index)), 1) for index in range(size)]
    types = [4 if model.id_to_piece(index) in user_defined else types[index] for index in range(size)]
    return {
        GGML + "model": "llama",
        GGML + "pre": "default",
        GGML + "tokens": [model.id_to_piece(index) for index in range(size)],
        GGML + "scores": [model.get_score(index) for index in range(size)],
        GGML + "token_type": types,
        GGML + "bos_token_id": model.bos_id(),
        GGML + "eos_token_id": model.eos_id(),
        GGML + "unknown_token_id": model.unk_id(),
    }


SENTENCEPIECES = {
    "as Llama 2's": ((), {}, {}),
    "without a prefix": ((), {"add_dummy_prefix": False}, {GGML + "add_space_prefix": False}),
    "without bytes": ((), {"byte_fallback": False, "vocab_size": 300}, {}),
    "pieces of spaces": ((), {"allow_whitespace_only_pieces": True}, {}),
    "user-defined": (("<|x|>", "import", "▁▁▁▁", "\n", "ab"), {}, {}),
    "user-defined, without a prefix": (("\n", "▁▁"), {"add_dummy_prefix": False}, {GGML + "add_space_prefix": False}),
}


@pytest.mark.parametrize("name", SENTENCEPIECES)
def test_sentencepiece_ids(tmp_path, name):
    user_defined, options, changes = SENTENCEPIECES[name]
    model = train(user_defined, **options)
    write_tokenizer(pieces_of(model, user_defined) | changes, 1000, tmp_path)
    ours, prepared = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in [*TEXTS, *random_texts(200)]:
        ids = model.encode(text)
        assert ours(text, add_special_tokens=False).input_ids == ids, text
        assert prepared.encode(text) == ids
        if model.unk_id() not in ids:
            assert ours.decode(ids) == model.decode(ids)
    assert ours("x").input_ids == [model.bos_id(), *model.encode("x")]
    assert (ours.bos_token, ours.eos_token, ours.unk_token) == ("<s>", "</s>", "<unk>")
    assert prepared.eod == model.eos_id() and prepared.vocab_size == model.vocab_size()


def test_special_and_added_tokens_of_sentencepiece_files(tmp_path):
    """Special tokens in a text, and tokens that were added after training: each piece of text begins with a space."""
    model = train()
    metadata = pieces_of(model)
    for token, kind in (("<|im_start|>", 3), ("<|note|>", 4)):
        metadata[GGML + "tokens"].append(token)
        metadata[GGML + "token_type"].append(kind)
        metadata[GGML + "scores"].append(-1000.0)
    metadata |= {GGML + "add_bos_token": False, GGML + "add_eos_token": True, GGML + "padding_token_id": 600}
    metadata["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    write_tokenizer(metadata, 1000, tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    text = "one<|im_start|>two<|note|> three</s>"
    expected = [*model.encode("one"), 600, *model.encode("two"), 601, *model.encode(" three"), 2]
    assert ours(text, add_special_tokens=False).input_ids == expected
    assert ours(text).input_ids == [*expected, 2]
    assert ours.pad_token == "<|im_start|>"
    assert ours.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def byte_level(pre: str) -> tuple[tokenizers.Tokenizer, dict]:
    """Trains a byte-level tokenizer, and returns it with its metadata as llama.cpp's converter writes it."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    splits = [
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for pattern in PRE_TOKENIZERS[pre].patterns
    ]
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*splits, letters])
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SOURCE.split("\n"), trainer)
    vocab = inner.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = json.loads(inner.to_str())["model"]["merges"]
    return inner, {
        GGML + "model": "gpt2",
        GGML + "pre": pre,
        GGML + "tokens": tokens,
        GGML + "token_type": [3 if token in ("<|end|>", "<|pad|>") else 1 for token in tokens],
        GGML + "merges": [" ".join(merge) for merge in merges],
        GGML + "bos_token_id": 0,
        GGML + "eos_token_id": 0,
    }


def hf_pre_tokenizer(name: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    """Returns the pre-tokenizer of the model families' own tokenizer.json files."""
    split, level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "gpt-2":
        return level
    if name == "smollm":
        return split.Sequence([split.Digits(individual_digits=True), level])
    digits = {"llama-bpe": "{1,3}", "qwen2": "", "deepseek-r1-qwen": ""}[name]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    whole = split.Split(tokenizers.Regex(pattern), behavior="isolated", invert=False)
    return split.Sequence([whole, split.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen"])
def test_byte_level_ids(tmp_path, name):
    inner, metadata = byte_level(name)
    inner.pre_tokenizer = hf_pre_tokenizer(name)
    write_tokenizer(metadata, 1000, tmp_path)
    ours, prepared = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for text in [*TEXTS, *random_texts(100)]:
        normal = unicodedata.normalize("NFC", text) if name == "qwen2" else text
        ids = inner.encode(normal, add_special_tokens=False).ids
        assert ours(text, add_special_tokens=False).input_ids == ids == prepared.encode(text), text
        assert ours.decode(ids) == normal
    begins = [0] if name == "llama-bpe" else []
    assert ours("x<|pad|>y").input_ids == [*begins, *prepared.encode("x"), 1, *prepared.encode("y")]
    assert (ours.bos_token, ours.eos_token) == ("<|end|>", "<|end|>")


def tokens(count: int = VOCAB) -> list[str]:
    return [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{value:02X}>" for value in range(256)),
        *map(chr, range(97, 97 + count - 259)),
    ]


SMALL = {
    GGML + "model": "llama",
    GGML + "tokens": tokens(),
    GGML + "scores": [float(-index) for index in range(VOCAB)],
    GGML + "token_type": [2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259),
    GGML + "bos_token_id": 1,
    GGML + "eos_token_id": 2,
    GGML + "unknown_token_id": 0,
}
ODD_VALUES = {
    "model": ["bert", "t5", "rwkv", "plamo2", "nonsense", 5, True, ["llama"], REMOVED],
    "tokens": [[1, 2, 3], "abc", 7, ["x"] * VOCAB, tokens(299), [*tokens(299), ""], [*tokens(299), "a"], REMOVED,
               [*tokens(VOCAB), "one", "more"]],
    "scores": [[1.0], "x", [1] * VOCAB, [float("nan")] * VOCAB, [float("inf")] * VOCAB, 5, REMOVED],
    "token_type": [[1], ["x"] * VOCAB, [99] * VOCAB, [-1] * VOCAB, 3, REMOVED, [2] * VOCAB, [6] * VOCAB,
                   [1] * VOCAB, [2, 3, 3, 1] + [6] * 255 + [1] * 41],
    "unknown_token_id": [5],
    "add_bos_token": ["x", 5, [True]],
    "add_eos_token": [1.0],
    "add_space_prefix": ["x", [1], 0],
    "remove_extra_whitespaces": [True, "x"],
    "precompiled_charsmap": [[1, 2, 3], "map"],
    "normalizer.lowercase": [True],
    "of_next_year": [5, "x", True],
}  # fmt: skip
ODD_BYTE_LEVEL = {
    "pre": [REMOVED, "chatglm-bpe", 5, "superbpe"],
    "merges": [REMOVED, ["nospace"], [""], [" "], [1], "a b", ["a b c"], [" a b"], ["zz yy"], ["a b", "a b"]],
    "token_type": [[6] * 600, REMOVED],
    "bos_token_id": [REMOVED, 10**9, -1, 1.5, "x", True, [1]],
}


def assert_weights_alone(tmp_path, changes, caplog):
    """The weights are converted, the tokenizer is left out, and the manifest and `inspect` say so."""
    path = write(tmp_path / "a.gguf", changes=changes)
    with caplog.at_level(logging.WARNING):
        manifest = convert(formats.open(path), tmp_path / "hf", "hf", overwrite=True)
    assert len(manifest.tensors) == 21
    assert not [name for name in manifest.files if "token" in name]
    (left,) = [text for text in manifest.left_behind if text.startswith("tokenizer (")]
    assert left in caplog.text
    assert left in describe(formats.open(path))["unread"]
    return left


@pytest.mark.parametrize("name", ODD_VALUES)
def test_an_odd_tokenizer_leaves_the_weights(tmp_path, name, caplog):
    for value in ODD_VALUES[name]:
        left = assert_weights_alone(tmp_path, SMALL | {GGML + name: value}, caplog)
        assert "tokenizer.ggml." in left


@pytest.mark.parametrize("name", ODD_BYTE_LEVEL)
def test_an_odd_byte_level_tokenizer_leaves_the_weights(tmp_path, name, caplog):
    _, metadata = byte_level("llama-bpe")
    vocab = {"llama.vocab_size": REMOVED}
    small = {**metadata, **vocab, GGML + "tokens": metadata[GGML + "tokens"][:VOCAB]}
    small[GGML + "token_type"] = metadata[GGML + "token_type"][:VOCAB]
    known = set(small[GGML + "tokens"])
    pairs = [merge for merge in metadata[GGML + "merges"] if {*merge.split(" "), merge.replace(" ", "")} <= known]
    small[GGML + "merges"] = pairs
    assert "tokenizer.json" in {file.name for file in formats.open(write(tmp_path / "b.gguf", changes=small)).files}
    for value in ODD_BYTE_LEVEL[name]:
        assert_weights_alone(tmp_path, small | {GGML + name: value}, caplog)


def test_tokens_that_are_no_text_leave_the_weights(tmp_path, caplog):
    path = write(tmp_path / "a.gguf", changes=SMALL)
    content = path.read_bytes()
    path.write_bytes(
        content.replace(b"\x06\x00\x00\x00\x00\x00\x00\x00<0x41>", b"\x06\x00\x00\x00\x00\x00\x00\x00<0x\xff\xfe>")
    )
    (left,) = formats.open(path).unread
    assert "texts in UTF-8" in left


def test_equal_scores_do_not_order_merges(tmp_path, caplog):
    names = [*tokens(297), "ab", "bc", "abc"]
    for scores in ([0.0] * VOCAB, [0.0] * 297 + [-1.0, -1.0, -2.0]):
        left = assert_weights_alone(tmp_path, SMALL | {GGML + "tokens": names, GGML + "scores": scores}, caplog)
        assert "different scores" in left
    ordered = SMALL | {GGML + "tokens": names, GGML + "scores": [0.0] * 297 + [-1.0, -2.0, -3.0]}
    assert formats.open(write(tmp_path / "b.gguf", changes=ordered)).unread == ()


def test_special_ids_and_templates_that_are_not_understood_are_named(tmp_path):
    changes = {
        GGML + "bos_token_id": 10**9, GGML + "eos_token_id": "2", GGML + "padding_token_id": 2,
        GGML + "add_bos_token": False, "tokenizer.chat_template": 5, "tokenizer.chat_template.tool_use": "{{ x }}",
        "tokenizer.chat_templates": ["tool_use"],
    }  # fmt: skip
    reader = formats.open(write(tmp_path / "a.gguf", changes=SMALL | changes))
    assert reader.carried == {"pad_token_id": 2}
    assert "tokenizer.json" in {file.name for file in reader.files}
    assert sorted(text.split("(")[0].strip() for text in reader.unread) == [
        "chat template", "chat template 'tool_use'", "special token", "special token",
    ]  # fmt: skip


def test_a_file_without_a_tokenizer_says_nothing(tmp_path, caplog):
    for changes in ({}, {GGML + "model": "none"}, {GGML + "model": "no_vocab"}):
        reader = formats.open(write(tmp_path / "a.gguf", changes=changes))
        assert (reader.files, reader.unread) == ((), ())
    assert not caplog.text


def test_reading_weights_does_not_read_the_tokenizer(tmp_path, caplog):
    reader = formats.open(write(tmp_path / "a.gguf", changes=SMALL | {GGML + "model": "bert"}))
    assert reader.read("final_norm").shape == (32,)
    assert not caplog.text


def test_a_tokenizer_smaller_than_the_embedding_is_kept(tmp_path):
    changes = {key: value[:280] if isinstance(value, list) else value for key, value in SMALL.items()}
    reader = formats.open(write(tmp_path / "a.gguf", changes=changes))
    assert reader.unread == ()
    assert load_tokenizer(reader.files[0].parent).vocab_size == 280


def test_the_package_writes_types_that_are_read():
    assert {int(kind) for kind in gguf.TokenType} == {1, 2, 3, 4, 5, 6}
    assert Type.ARRAY == 9
