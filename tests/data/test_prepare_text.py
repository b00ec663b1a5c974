import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.data import prepare_text as preparing
from megatron_ligo.data.documents import DocumentSource, find_text_files
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.tokenizer import digest_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STRANGE = ["def f(x):\n    return x  # é🙂中\n\n\tend\r\n", "  two  spaces ", "x", "\x00\x7f"]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A real byte-level BPE tokenizer, trained on a little of the standard library."""
    folder = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(
        islice(DocumentSource((), python_docs=True), 40), 600, special_tokens=["<|endoftext|>", "<|turn|>"]
    )
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|turn|>"}}')
    return folder


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "texts"
    (folder / "inner").mkdir(parents=True)
    for index, text in enumerate(STRANGE):
        (folder / f"{index}.txt").write_bytes(text.encode())
    (folder / "inner" / "notes.md").write_text("# Title\n")
    (folder / "picture.png").write_bytes(b"\xff\xd8")
    lines = [{"text": f"document {index} " * (index % 40 + 1)} for index in range(300)]
    (folder / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return folder


def recipe(corpus: Path, folder: Path, **changes) -> TextRecipe:
    return TextRecipe(
        DocumentSource(find_text_files([str(corpus)])), **{"tokenizer": str(folder), "valid_fraction": 0.2, **changes}
    )


def documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    return [data[index].tolist() for index in range(len(data))]


def test_every_document_is_there_once_and_whole(corpus, hf_folder, tmp_path):
    splits = prepare_text(recipe(corpus, hf_folder), tmp_path / "out", workers=1)
    tokenizer = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    found = [ids for name in ("train", "valid") for ids in documents(tmp_path / "out" / name)]
    assert all(ids[-1] == end for ids in found)
    texts = sorted(tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in found)
    assert texts == sorted(DocumentSource(find_text_files([str(corpus)])))
    assert sum(record["documents"] for record in splits.values()) == len(found) == 305
    assert sum(record["tokens"] for record in splits.values()) == sum(map(len, found))
    assert 20 < splits["valid"]["documents"] < 120


def test_a_prepared_pair_and_its_record_agree(corpus, hf_folder, tmp_path):
    splits = prepare_text(recipe(corpus, hf_folder), tmp_path / "out", workers=1)
    for name, record in splits.items():
        errors = ErrorCollector(name)
        pair = open_indexed_files(str(tmp_path / "out" / name), errors)
        assert not errors.problems and pair.record == record
        assert (pair.dtype, pair.tokens, pair.documents) == (np.uint16, record["tokens"], record["documents"])
        assert pair.token_range()[1] == record["max_token"] < record["vocab_size"] == 600
        assert record["tokenizer"] == digest_tokenizer(hf_folder) == digest_tokenizer(tmp_path / "out" / "tokenizer")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").is_file()


def test_the_same_bytes_for_any_number_of_workers(corpus, hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_BYTES", 2000)
    for workers in (1, 3):
        prepare_text(recipe(corpus, hf_folder), tmp_path / str(workers), workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in ("train.bin", "train.idx", "train.json", "valid.bin", "valid.idx", "valid.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_equal_documents_fall_on_one_side(tmp_path, hf_folder):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {index % 50}"}) + "\n" for index in range(200)))
    prepare_text(TextRecipe(DocumentSource((path,)), str(hf_folder), valid_fraction=0.3), tmp_path / "out", 1)
    train, valid = ({tuple(ids) for ids in documents(tmp_path / "out" / name)} for name in ("train", "valid"))
    assert len(train) + len(valid) == 50 and not train & valid


def found(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sentencepiece(tmp_path):
    texts = DocumentSource((), python_docs=True, max_bytes=600_000)
    for name in ("a", "b"):
        prepare_text(TextRecipe(texts, train_vocab=1000, valid_fraction=0.1), tmp_path / name, 1)
    one, other = ({path.name: path.read_bytes() for path in found(tmp_path / name)} for name in ("a", "b"))
    assert one == other and {"train.bin", "tokenizer.model", "prepared.json"} <= set(one)
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    import sentencepiece

    inner = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a" / "tokenizer" / "tokenizer.model"))
    assert all(inner.decode(tokenizer.encode(text)) == text for text in STRANGE)
    record = json.loads((tmp_path / "a" / "train.json").read_text())
    assert record["text_bytes"] / record["tokens"] > 2.2 and record["eod"] == inner.eos_id()


def test_a_second_run_says_what_it_found(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    first = prepare_text(recipe(corpus, hf_folder), out, 1)
    stamp = (out / "train.bin").stat().st_mtime_ns
    assert prepare_text(recipe(corpus, hf_folder), out, 1) == first
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(DataError, match="Choose another --output"):
        prepare_text(recipe(corpus, hf_folder, valid_fraction=0.3), out, 1)
    (corpus / "0.txt").write_text("changed")
    with pytest.raises(DataError, match="Choose another --output"):
        prepare_text(recipe(corpus, hf_folder), out, 1)


def test_a_run_that_was_killed_while_it_renamed_is_ended(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    counts = prepare_text(recipe(corpus, hf_folder), out, 1)
    expected = {path.relative_to(out): path.read_bytes() for path in found(out)}
    (out / ".preparing").mkdir()
    for name in ("valid.bin", "tokenizer", "prepared.json"):
        (out / name).rename(out / ".preparing" / name)
    assert prepare_text(recipe(corpus, hf_folder), out, 1) == counts
    assert {path.relative_to(out): path.read_bytes() for path in found(out)} == expected
    assert not (out / ".preparing").exists()


def test_two_at_once(corpus, hf_folder, tmp_path):
    with exclusive_access(tmp_path / "out"), pytest.raises(ConfigError, match="a folder that no other run writes to"):
        prepare_text(recipe(corpus, hf_folder), tmp_path / "out", 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_is_left_of_a_run_that_failed(corpus, hf_folder, tmp_path):
    (corpus / "zz.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"zz\.txt: expected UTF-8 text"):
        prepare_text(recipe(corpus, hf_folder), tmp_path / "out", 2)
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_documents_are_counted(tmp_path, hf_folder):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    texts = DocumentSource(find_text_files([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]))
    splits = prepare_text(TextRecipe(texts, str(hf_folder), valid_fraction=0), tmp_path / "out", 1)
    assert splits["train"]["documents"] == 1 and splits["train"]["empty_documents_left_out"] == 1


def test_a_split_without_documents_is_refused(tmp_path, hf_folder):
    (tmp_path / "b.txt").write_text("b")
    texts = DocumentSource((tmp_path / "b.txt",))
    with pytest.raises(DataError, match=r"expected at least one document, found none"):
        prepare_text(TextRecipe(texts, str(hf_folder), valid_fraction=1e-9), tmp_path / "out", 1)


# Texts


def test_all_faulty_lines_of_a_jsonl(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n{"tekst": "x"}\nnonsense\n["text"]\n')
    with pytest.raises(DataError) as caught:
        list(DocumentSource((path,)))
    assert "4 problems" in str(caught.value) and "line 2: expected text under 'text', found int" in str(caught.value)


def test_all_wrong_paths(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="3 problems"):
        find_text_files([str(tmp_path / "a.pdf"), str(tmp_path / "empty"), "no/such"])


def test_the_standard_library():
    texts = list(DocumentSource((), python_docs=True))
    assert texts == list(DocumentSource((), python_docs=True))
    assert sum(map(len, texts)) > 5_000_000
    assert sum("return" in text for text in texts) > 300
    assert any(text.startswith("itertools\n\n") for text in texts)
    capped = list(DocumentSource((), python_docs=True, max_bytes=100_000))
    assert capped == texts[: len(capped)] and sum(len(text.encode()) for text in capped) <= 100_000


# Tokenizers


def test_the_token_that_ends_a_document(hf_folder, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    assert load_tokenizer(hf_folder).eod == inner.token_to_id("<|endoftext|>")
    assert load_tokenizer(hf_folder, "<|turn|>").eod == inner.token_to_id("<|turn|>")
    with pytest.raises(DataError, match=r"Name it with --eod"):
        load_tokenizer(hf_folder, "<|nothing|>")
    other = tokenizers.ByteLevelBPETokenizer()
    other.train_from_iterator(["abc"], 300, special_tokens=["<|turn|>"])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="a token that ends a document"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|turn|>"}')
    assert load_tokenizer(tmp_path).eod == other.token_to_id("<|turn|>")


def test_tokenizer_faults(hf_folder, tmp_path):
    with pytest.raises(DataError, match="neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)
    table = json.loads((hf_folder / "tokenizer.json").read_text())
    table["model"]["vocab"][max(table["model"]["vocab"])] = 1 << 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match=f"no token's number above {(1 << 31) - 1}, found {1 << 31}"):
        load_tokenizer(tmp_path)


# The command


def command(*args: object) -> tuple[int, str, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tools/prepare_data.py", *map(str, args)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, told(done.stderr)


def told(err: str) -> str:
    """Without what torch's CUDA build says of a machine that has CUDA's tools and no GPU."""
    return "".join(line for line in err.splitlines(keepends=True) if "No CUDA runtime is found" not in line)


def test_the_command(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    code, text, err = command(
        corpus, "--tokenizer", hf_folder, "--output", out, "--valid-fraction", 0.2, "--workers", 2
    )
    assert code == 0 and err == "", err
    assert "/train: " in text and "/valid: " in text and "bytes per token" in text
    code, text, err = command(corpus, "--tokenizer", hf_folder, "--output", out, "--valid-fraction", 0.2)
    assert code == 0 and "already there" in err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--tokenizer", "x"], "inputs: expected files"),
        (["--python-docs"], "one of --tokenizer and --train-sentencepiece"),
        (["--python-docs", "--tokenizer", "x", "--valid-fraction", "1"], "--valid-fraction"),
        (["no/such", "--tokenizer", "x"], "no/such: expected a file or a folder"),
        (["--python-docs", "--tokenizer", "no/such"], "no/such: expected a folder with tokenizer.json"),
    ],
)
def test_the_commands_faults(args, part, tmp_path):
    code, _, err = command(*args, "--output", tmp_path / "out")
    assert code == 2 and part in err and "Traceback" not in err


def test_an_interrupt_leaves_nothing(tmp_path, hf_folder):
    out = tmp_path / "out"
    command = [
        sys.executable,
        ROOT / "tools/prepare_data.py",
        "--python-docs",
        "--tokenizer",
        hf_folder,
        "--output",
        out,
    ]
    process = subprocess.Popen(
        [*command, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(out.glob(".preparing*/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and told(err) == "SIGINT: ended.\n"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("chosen", ["a tokenizer", "--train-sentencepiece"])
def test_a_full_disk_leaves_nothing(small_disk, hf_folder, chosen):
    """Full from the start (sentencepiece writes its model without a look), or on the way."""
    options = ["--tokenizer", hf_folder, "--python-docs"]
    if chosen == "--train-sentencepiece":
        room = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(room.f_bavail * room.f_bsize))
        options = [chosen, 600, "--max-bytes", 60_000, "--python-docs"]
    code, _, err = command(*options, "--output", small_disk / "out", "--workers", 1)
    assert code == 2 and "found it full" in err and "Traceback" not in err, err
    assert list((small_disk / "out").iterdir()) == []
