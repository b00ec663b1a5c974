"""Tokenizers made from vocab.txt, or vocab.json and merges.txt: the ids are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from megatron_ligo.common.errors import DataError
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.tokenizer import digest_tokenizer, load_tokenizer, read_special_tokens

SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "<|endoftext|>"]
TEXTS = ["Hello World, naïve caf\u00e9 don't  stop", " def f(x):\n    return x", "中文 🙂 <mask> [MASK] </s>", "x"]


def texts() -> DocumentSource:
    return DocumentSource((), python_docs=True, max_bytes=60_000)


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory) -> Path:
    """A folder with vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("byte_pairs")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(iter(texts()), 700, special_tokens=SPECIAL_TOKENS, show_progress=False)
    inner.save_model(str(folder))
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A folder with a vocab.txt in lower case."""
    folder = tmp_path_factory.mktemp("words")
    inner = tokenizers.BertWordPieceTokenizer()
    inner.train_from_iterator(iter(texts()), 900, show_progress=False)
    inner.save_model(str(folder))
    return folder


def copy(source: Path, target: Path, **settings: dict) -> Path:
    """Copies a vocabulary beside settings files (config for config.json, ...)."""
    shutil.copytree(source, target)
    for name, content in settings.items():
        (target / f"{name}.json").write_text(json.dumps(content))
    return target


SETTINGS = {
    "gpt2": {"config": {"model_type": "gpt2"}},
    "gpt2 with a prefix": {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}},
    "gpt2 with a token": {"config": {"model_type": "gpt2"}, "added_tokens": {"naïve": 700}},
    "roberta": {"config": {"model_type": "roberta"}},
    "roberta by class": {
        "tokenizer_config": {"tokenizer_class": "RobertaTokenizer"},
        "special_tokens_map": {"mask_token": "<mask>", "eos_token": {"content": "</s>", "lstrip": False}},
    },
    "qwen2": {"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}},
    "bert": {"config": {"model_type": "bert"}},
    "bert with case": {"tokenizer_config": {"tokenizer_class": "BertTokenizer", "do_lower_case": False}},
    "bert with accents": {"config": {"model_type": "bert"}, "tokenizer_config": {"strip_accents": False}},
    "electra": {"config": {"model_type": "electra"}},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_the_ids_are_those_of_transformers(name, byte_pairs, words, tmp_path):
    source = words if name.startswith(("bert", "electra")) else byte_pairs
    folder = copy(source, tmp_path / "small", **SETTINGS[name])
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False), text
    assert tokenizer.vocab_size == len(reference)
    special = read_special_tokens(folder)
    assert {name: special[name] for name in reference.all_special_tokens} == dict(
        zip(reference.all_special_tokens, reference.all_special_ids, strict=True)
    )
    assert tokenizer.eod == reference.convert_tokens_to_ids("[SEP]" if source is words else "<|endoftext|>")


def test_a_prepared_data_set_keeps_the_vocabulary(words, tmp_path):
    folder = copy(words, tmp_path / "small", config={"model_type": "bert", "hidden_size": 8})
    prepare_text(TextRecipe(texts(), str(folder), valid_fraction=0), tmp_path / "out", workers=2)
    record = json.loads((tmp_path / "out" / "train.json").read_text())
    assert record["tokenizer"] == digest_tokenizer(folder) == digest_tokenizer(tmp_path / "out" / "tokenizer")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").encode(TEXTS[0]) == load_tokenizer(folder).encode(TEXTS[0])


def test_the_digest_follows_what_the_ids_depend_on(words, tmp_path):
    digests = {
        digest_tokenizer(copy(words, tmp_path / str(index), **settings))
        for index, settings in enumerate(
            [
                {"config": {"model_type": "bert"}},
                {"config": {"model_type": "electra"}},
                {"config": {"model_type": "bert"}, "tokenizer_config": {"do_lower_case": False}},
            ]
        )
    }
    assert len(digests) == 3
    other_size = copy(words, tmp_path / "same", config={"model_type": "bert", "hidden_size": 9})
    assert digest_tokenizer(other_size) in digests


def test_without_a_class_the_tokens_say_what_they_are(words, byte_pairs, tmp_path, caplog):
    reference = transformers.BertTokenizer.from_pretrained(copy(words, tmp_path / "lower"))
    assert load_tokenizer(tmp_path / "lower" / "vocab.txt").encode(TEXTS[0]) == reference.encode(
        TEXTS[0], add_special_tokens=False
    )
    copy(words, tmp_path / "cased")
    with (tmp_path / "cased" / "vocab.txt").open("a") as stream:
        stream.write("Hello\n")
    tokenizer = load_tokenizer(tmp_path / "cased")
    assert tokenizer.encode("Hello") == [tokenizer.vocab_size - 1]
    reference = transformers.GPT2Tokenizer.from_pretrained(byte_pairs)
    assert load_tokenizer(byte_pairs).encode(TEXTS[0]) == reference.encode(TEXTS[0])
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert ["lower case" in text or "capitals" in text or "GPT2Tokenizer" in text for text in said] == [True] * 3


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as error:
        load_tokenizer(folder)
    return str(error.value)


def test_vocabularies_that_another_class_would_lose_are_refused(words, byte_pairs, tmp_path):
    """transformers makes an empty GPT-2 tokenizer of a vocab.txt, without a word."""
    assert "left out or renumbered" in refusal(copy(words, tmp_path / "a", config={"model_type": "gpt2"}))
    unknown = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    folder = copy(byte_pairs, tmp_path / "b", tokenizer_config=unknown)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass OwnTokenizer: pass\n")
    assert "tokenizer_class" in refusal(folder) and not (tmp_path / "executed").exists()
    assert "tokenizer_class" in refusal(copy(words, tmp_path / "c", config={"model_type": "llama"}))
    (copy(byte_pairs, tmp_path / "d") / "merges.txt").unlink()
    assert "vocab.json and merges.txt" in refusal(tmp_path / "d")
    (copy(byte_pairs, tmp_path / "e") / "vocab.json").write_text("[1]")
    assert "vocab.json: expected a vocabulary" in refusal(tmp_path / "e")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "vocab.txt").write_text("a\nb\n")
    assert "no [UNK]" in refusal(tmp_path / "f")
