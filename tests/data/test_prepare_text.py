import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ligo.common.errors import ConfigError, DataError, ErrorCollector, Problem
from megatron_ligo.common.file_lock import exclusive_access
from megatron_ligo.data.corpus import encoding_pool
from megatron_ligo.data.corpus.text_files import select_text_files
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.indexed_dataset import open_indexed_files
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.tokenizer import digest_tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
UNUSUAL_TEXTS = ["def f(x):\n    return x  # é🙂中\n\n\tend\r\n", "  two  spaces ", "x", "\x00\x7f"]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer, trained on a part of the standard library."""
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
    for index, text in enumerate(UNUSUAL_TEXTS):
        (folder / f"{index}.txt").write_bytes(text.encode())
    (folder / "inner" / "notes.md").write_text("# Title\n")
    (folder / "picture.png").write_bytes(b"\xff\xd8")
    lines = [{"text": f"document {index} " * (index % 40 + 1)} for index in range(300)]
    (folder / "many.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return folder


def make_recipe(corpus: Path, folder: Path, **changes) -> TextRecipe:
    return TextRecipe(
        DocumentSource(select_text_files([str(corpus)]).files),
        **{"tokenizer": str(folder), "valid_fraction": 0.2, **changes},
    )


def read_documents(prefix: Path) -> list[list[int]]:
    data = IndexedDataset(str(prefix))
    return [data[index].tolist() for index in range(len(data))]


def test_every_document_is_written_once_and_completely(corpus, hf_folder, tmp_path):
    splits = prepare_text(make_recipe(corpus, hf_folder), tmp_path / "out", workers=1)
    tokenizer = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    documents = [ids for name in ("train", "valid") for ids in read_documents(tmp_path / "out" / name)]
    assert all(ids[-1] == end for ids in documents)
    texts = sorted(tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents)
    assert texts == sorted(DocumentSource(select_text_files([str(corpus)]).files))
    assert sum(record["documents"] for record in splits.values()) == len(documents) == 305
    assert sum(record["tokens"] for record in splits.values()) == sum(map(len, documents))
    assert 20 < splits["valid"]["documents"] < 120


def test_a_prepared_pair_and_its_record_agree(corpus, hf_folder, tmp_path):
    splits = prepare_text(make_recipe(corpus, hf_folder), tmp_path / "out", workers=1)
    for name, record in splits.items():
        errors = ErrorCollector(name)
        pair = open_indexed_files(str(tmp_path / "out" / name), errors)
        assert not errors.problems and pair.record == record
        assert (pair.dtype, pair.tokens, pair.documents) == (np.uint16, record["tokens"], record["documents"])
        assert pair.token_range()[1] == record["max_token"] < record["vocab_size"] == 600
        assert record["tokenizer"] == digest_tokenizer(hf_folder) == digest_tokenizer(tmp_path / "out" / "tokenizer")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer_config.json").is_file()


def test_the_same_bytes_for_any_number_of_workers(corpus, hf_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding_pool, "CHUNK_BYTES", 2000)
    for workers in (1, 3):
        prepare_text(make_recipe(corpus, hf_folder), tmp_path / str(workers), workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "3").iterdir())
    for name in ("train.bin", "train.idx", "train.json", "valid.bin", "valid.idx", "valid.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes(), name


def test_equal_documents_fall_into_one_split(tmp_path, hf_folder):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {index % 50}"}) + "\n" for index in range(200)))
    prepare_text(TextRecipe(DocumentSource((path,)), str(hf_folder), valid_fraction=0.3), tmp_path / "out", 1)
    train, valid = ({tuple(ids) for ids in read_documents(tmp_path / "out" / name)} for name in ("train", "valid"))
    assert len(train) + len(valid) == 50 and not train & valid


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sentencepiece(tmp_path):
    texts = DocumentSource((), python_docs=True, max_bytes=600_000)
    for name in ("a", "b"):
        prepare_text(TextRecipe(texts, train_vocab=1000, valid_fraction=0.1), tmp_path / name, 1)
    first, second = ({path.name: path.read_bytes() for path in list_files(tmp_path / name)} for name in ("a", "b"))
    assert first == second and {"train.bin", "tokenizer.model", "prepared.json"} <= set(first)
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer")
    assert load_tokenizer(tmp_path / "a").digest == tokenizer.digest
    import sentencepiece

    inner = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "a" / "tokenizer" / "tokenizer.model"))
    assert all(inner.decode(tokenizer.encode(text)) == text for text in UNUSUAL_TEXTS)
    record = json.loads((tmp_path / "a" / "train.json").read_text())
    assert record["text_bytes"] / record["tokens"] > 2.2 and record["eod"] == inner.eos_id()


def test_a_second_run_keeps_its_data_and_refuses_others(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    first = prepare_text(make_recipe(corpus, hf_folder), out, 1)
    stamp = (out / "train.bin").stat().st_mtime_ns
    assert prepare_text(make_recipe(corpus, hf_folder), out, 1) == first
    assert (out / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(DataError) as other_split:
        prepare_text(make_recipe(corpus, hf_folder, valid_fraction=0.3), out, 1)
    (corpus / "0.txt").write_text("changed")
    with pytest.raises(DataError) as other_text:
        prepare_text(make_recipe(corpus, hf_folder), out, 1)
    for error in (other_split.value, other_text.value):
        assert error.problems[0].where == str(out) and "'train.bin'" in error.problems[0].found


def test_a_run_killed_while_publishing_is_completed(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    counts = prepare_text(make_recipe(corpus, hf_folder), out, 1)
    expected = {path.relative_to(out): path.read_bytes() for path in list_files(out)}
    (out / ".preparing").mkdir()
    for name in ("valid.bin", "tokenizer", "prepared.json"):
        (out / name).rename(out / ".preparing" / name)
    assert prepare_text(make_recipe(corpus, hf_folder), out, 1) == counts
    assert {path.relative_to(out): path.read_bytes() for path in list_files(out)} == expected
    assert not (out / ".preparing").exists()


def test_concurrent_runs_are_refused(corpus, hf_folder, tmp_path):
    with exclusive_access(tmp_path / "out"), pytest.raises(ConfigError) as error:
        prepare_text(make_recipe(corpus, hf_folder), tmp_path / "out", 1)
    assert error.value.problems[0].where == str(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failed_run_leaves_nothing(corpus, hf_folder, tmp_path):
    (corpus / "zz.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError) as error:
        prepare_text(make_recipe(corpus, hf_folder), tmp_path / "out", 2)
    assert error.value.problems[0].where == str(corpus / "zz.txt") and "UTF-8" in error.value.problems[0].expected
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_documents_are_counted(tmp_path, hf_folder):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    texts = DocumentSource(select_text_files([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]).files)
    splits = prepare_text(TextRecipe(texts, str(hf_folder), valid_fraction=0), tmp_path / "out", 1)
    assert splits["train"]["documents"] == 1 and splits["train"]["empty_documents_left_out"] == 1


def test_a_split_without_documents_is_refused(tmp_path, hf_folder):
    (tmp_path / "b.txt").write_text("b")
    texts = DocumentSource((tmp_path / "b.txt",))
    with pytest.raises(DataError) as error:
        prepare_text(TextRecipe(texts, str(hf_folder), valid_fraction=1e-9), tmp_path / "out", 1)
    assert error.value.problems[0].where == "the valid split" and error.value.problems[0].found == "none"


# Documents


def test_all_invalid_lines_of_a_jsonl_are_reported(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "good"}\n{"text": 3}\n{"tekst": "x"}\nnonsense\n["text"]\n')
    with pytest.raises(DataError) as error:
        list(DocumentSource((path,)))
    assert [problem.where for problem in error.value.problems] == ["line 2", "line 3", "line 4", "line 5"]
    assert error.value.problems[0].found == "int" and "tekst" in error.value.problems[1].found


def test_all_bad_paths_are_reported(tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    paths = [str(tmp_path / "a.pdf"), str(tmp_path / "empty"), "no/such"]
    with pytest.raises(DataError) as error:
        select_text_files(paths)
    assert [problem.where for problem in error.value.problems] == paths


def test_documents_of_the_standard_library():
    texts = list(DocumentSource((), python_docs=True))
    assert texts == list(DocumentSource((), python_docs=True))
    assert sum(map(len, texts)) > 5_000_000
    assert sum("return" in text for text in texts) > 300
    assert any(text.startswith("itertools\n\n") for text in texts)
    capped = list(DocumentSource((), python_docs=True, max_bytes=100_000))
    assert capped == texts[: len(capped)] and sum(len(text.encode()) for text in capped) <= 100_000


# Tokenizers


def test_the_end_of_document_token(hf_folder, tmp_path):
    inner = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    assert load_tokenizer(hf_folder).eod == inner.token_to_id("<|endoftext|>")
    assert load_tokenizer(hf_folder, "<|turn|>").eod == inner.token_to_id("<|turn|>")
    with pytest.raises(DataError) as error:
        load_tokenizer(hf_folder, "<|nothing|>")
    assert "'<|nothing|>'" in error.value.problems[0].found and "--eod" in error.value.problems[0].hint
    other = tokenizers.ByteLevelBPETokenizer()
    other.train_from_iterator(["abc"], 300, special_tokens=["<|turn|>"])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError) as error:
        load_tokenizer(tmp_path)
    assert "'<|endoftext|>'" in error.value.problems[0].found
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|turn|>"}')
    assert load_tokenizer(tmp_path).eod == other.token_to_id("<|turn|>")


def load_problem(folder: Path) -> Problem:
    """Loads a tokenizer that must be refused; returns the problem."""
    with pytest.raises(DataError) as error:
        load_tokenizer(folder)
    (problem,) = error.value.problems
    return problem


def test_unusable_tokenizers_are_refused(hf_folder, tmp_path):
    assert load_problem(tmp_path).where == str(tmp_path)
    assert load_problem(tmp_path / "none").found == "nothing there"
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    assert load_problem(tmp_path).where == str(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load_problem(tmp_path).where == str(tmp_path / "tokenizer.json")
    table = json.loads((hf_folder / "tokenizer.json").read_text())
    table["model"]["vocab"][max(table["model"]["vocab"])] = 1 << 31
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    problem = load_problem(tmp_path)
    assert f"{(1 << 31) - 1}" in problem.expected and problem.found == f"{1 << 31}"


# The command


def run_tool(*args: object) -> tuple[int, str, str]:
    """Runs tools/prepare_data.py; returns its exit code, stdout and stderr."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, ROOT / "tools/prepare_data.py", *map(str, args)],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return process.returncode, process.stdout, drop_cuda_warning(process.stderr)


def drop_cuda_warning(text: str) -> str:
    """Removes the warning of torch's CUDA build on a machine with the CUDA toolkit and no GPU."""
    return "".join(line for line in text.splitlines(keepends=True) if "No CUDA runtime is found" not in line)


def test_the_tool(corpus, hf_folder, tmp_path):
    out = tmp_path / "out"
    code, out_text, err = run_tool(
        corpus, "--tokenizer", hf_folder, "--output", out, "--valid-fraction", 0.2, "--workers", 2
    )
    assert code == 0 and err == "", err
    assert f"{out}/train: " in out_text and f"{out}/valid: " in out_text
    code, _, err = run_tool(corpus, "--tokenizer", hf_folder, "--output", out, "--valid-fraction", 0.2)
    assert code == 0 and err.startswith(f"{out} ")


@pytest.mark.parametrize(
    ("args", "where"),
    [
        (["--tokenizer", "x"], "inputs: expected"),
        (["--python-docs"], "tokenizer: expected"),
        (["--python-docs", "--tokenizer", "x", "--valid-fraction", "1"], "--valid-fraction: expected"),
        (["no/such", "--tokenizer", "x"], "no/such: expected"),
        (["--python-docs", "--tokenizer", "no/such"], "no/such: expected"),
    ],
)
def test_bad_arguments_exit_with_2(args, where, tmp_path):
    code, _, err = run_tool(*args, "--output", tmp_path / "out")
    assert code == 2 and where in err and "Traceback" not in err


def test_an_interrupt_leaves_nothing(tmp_path, hf_folder):
    out = tmp_path / "out"
    tool = [sys.executable, ROOT / "tools/prepare_data.py"]
    process = subprocess.Popen(
        [*tool, "--python-docs", "--tokenizer", hf_folder, "--output", out, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not list(out.glob(".preparing*/train.bin")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and drop_cuda_warning(err) == "SIGINT: ended.\n"
    assert list(out.iterdir()) == []


def test_a_killed_run_leaves_no_workers(tmp_path, hf_folder):
    out = tmp_path / "out"
    tool = [sys.executable, ROOT / "tools/prepare_data.py"]
    process = subprocess.Popen(
        [*tool, "--python-docs", "--tokenizer", hf_folder, "--output", out, "--workers", "2"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    children: list[psutil.Process] = []
    # Python's resource tracker and two workers.
    while len(children) < 3 and time.monotonic() < deadline:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(60)
    assert len(children) == 3 and not psutil.wait_procs(children, timeout=60)[1]


@pytest.mark.parametrize("trained", [False, True])
def test_a_full_disk_leaves_nothing(small_disk, hf_folder, trained):
    """The disk fills up on the way, or is full from the start (sentencepiece does not check its writes)."""
    options = ["--tokenizer", hf_folder, "--python-docs"]
    if trained:
        free = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(free.f_bavail * free.f_bsize))
        options = ["--train-sentencepiece", 600, "--max-bytes", 60_000, "--valid-fraction", 0, "--python-docs"]
    code, _, err = run_tool(*options, "--output", small_disk / "out", "--workers", 1)
    assert code == 2 and "full" in err and "Traceback" not in err, err
    assert list((small_disk / "out").iterdir()) == []
