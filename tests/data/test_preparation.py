"""What the preparation says, records and checks before the work, its memory, and its files beside Megatron-core's."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_ligo.common.errors import DataError
from megatron_ligo.data.corpus import encoding_pool, preflight, split_writer
from megatron_ligo.data.corpus.split_writer import SplitWriter, token_dtype
from megatron_ligo.data.corpus.text_files import select_text_files
from megatron_ligo.data.documents import DocumentSource
from megatron_ligo.data.prepare_text import TextRecipe, prepare_text
from megatron_ligo.data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
STORIES = [f"Once upon a time, number {index}.\nThe end." for index in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    inner = tokenizers.ByteLevelBPETokenizer()
    inner.train_from_iterator(STORIES, 400, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return load_tokenizer(folder)


def run_tool(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/prepare_data.py", *map(str, args)]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200
    )


def test_one_text_file_is_cut_and_the_command_says_so(folder, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "stories.txt").write_text("\n<|endoftext|>\n".join(STORIES))
    (tmp_path / "texts" / "picture.png").write_bytes(b"png")
    result = run_tool(tmp_path / "texts", "--tokenizer", folder, "--output", tmp_path / "out", "--workers", 2)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "texts" / "stories.txt"
    assert f"{path}: cut into documents at '<|endoftext|>'" in result.stderr
    assert f"{tmp_path}/texts: skipped 1 .png (3 bytes)" in result.stdout
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert sum(split["documents"] for split in record["splits"].values()) == len(STORIES)
    assert record["texts"] == {
        "files": 1,
        "notes": [f"{tmp_path}/texts: skipped 1 .png (3 bytes)"],
        "cut_at": {str(path): "'<|endoftext|>'"},
        "bad_lines_skipped": {},
    }


def test_bad_lines_by_the_command(folder, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES) + '{"text": "\\udead"}\n{}\n')
    arguments = (path, "--tokenizer", folder, "--output", tmp_path / "out", "--workers", 2)
    failed = run_tool(*arguments)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert f"{path} (2 problems)" in failed.stderr
    assert f"line {len(STORIES) + 1}: " in failed.stderr and f"line {len(STORIES) + 2}: " in failed.stderr
    assert not list((tmp_path / "out").iterdir())
    skipped = run_tool(*arguments, "--on-bad-line", "skip")
    assert skipped.returncode == 0 and "2 bad lines were skipped." in skipped.stderr
    record = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert record["texts"]["bad_lines_skipped"] == {str(path): 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines_of_later_chunks_are_in_the_same_error(workers, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ligo.data.corpus.byte_streams.CHUNK_BYTES", 500)
    monkeypatch.setattr(encoding_pool, "CHUNK_BYTES", 500)
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in STORIES]
    for number in (100, 101, 150, 200):
        lines[number - 1] = "{}"
    path.write_text("\n".join(lines))
    other = tmp_path / "b.jsonl"
    other.write_text("{}\n")
    recipe = TextRecipe(DocumentSource((path, other)), str(folder))
    with pytest.raises(DataError) as error:
        prepare_text(recipe, tmp_path / "out", workers)
    assert [problem.where for problem in error.value.problems] == [f"line {n}" for n in (100, 101, 150, 200)]


def test_splits_are_checked_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_ligo.data.prepare_text.EncodingPool", None)
    (tmp_path / "a.txt").write_text("one document")
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"the valid split: .* 1 document .*--separator.*--valid-fraction"):
        texts = DocumentSource(select_text_files([str(tmp_path)]).files)
        prepare_text(TextRecipe(texts, str(folder), valid_fraction=1e-9), tmp_path / "out", 1)
    with pytest.raises(DataError, match="the train split"):
        prepare_text(TextRecipe(DocumentSource((tmp_path / "b.txt",)), str(folder)), tmp_path / "out", 1)


def test_a_lossy_tokenizer_is_warned_of_once(tokenizer, tmp_path, caplog):
    preflight.warn_if_lossy(["A text", "  with spaces", "é🙂\x00"], tokenizer)
    assert not caplog.records
    inner = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    inner.normalizer = tokenizers.normalizers.Strip(left=True, right=False)
    inner.save(str(tmp_path / "tokenizer.json"))
    preflight.warn_if_lossy(["A text", "def f():\n    return 1", "  x"], load_tokenizer(tmp_path))
    (record,) = caplog.records
    assert "'    return 1' is read back as 'return 1'" in record.message and "(in 2 of 4 samples)" in record.message


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_the_index_has_the_bytes_of_megatrons_builder(block, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(split_writer, "BLOCK_DOCUMENTS", block)
    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_dtype(tokenizer.vocab_size))
    writer = SplitWriter(tmp_path / "ours", tokenizer)
    for _ in range(3):
        lengths = rng.integers(0, 9, 20)
        ids = rng.integers(0, tokenizer.vocab_size, lengths.sum())
        writer.add(ids, lengths, 0)
        for document in np.split(ids, np.cumsum(lengths)[:-1]):
            if document.size:
                builder.add_document(document, [document.size])
    builder.finalize(str(tmp_path / "theirs.idx"))
    writer.finish()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes(), suffix
    assert {path.name for path in tmp_path.iterdir()} == {
        "ours.bin", "ours.idx", "ours.json", "theirs.bin", "theirs.idx"
    }  # fmt: skip


@pytest.mark.parametrize("size", [1, 65499, 65500, 65536, 10**6])
def test_the_types_of_token_ids_are_megatrons(size):
    assert token_dtype(size) is DType.optimal_dtype(size)


class PeakMemory(threading.Thread):
    """Samples the memory of a process and its children: `peak` is the highest sum, in MiB."""

    def __init__(self, process: subprocess.Popen):
        super().__init__()
        self.process, self.peak = psutil.Process(process.pid), 0.0

    def run(self) -> None:
        while self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in [self.process, *self.process.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total / 2**20)
            time.sleep(0.05)


@pytest.mark.parametrize("kind", ["lines.jsonl.gz", "long_line.jsonl", "stories.txt"])
def test_the_memory_does_not_grow_with_the_text(kind, tmp_path):
    """20 MB of text: a tokenizer that gets them whole takes about 200 times as much."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"word": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / kind
    words = "word " * 200
    if kind == "stories.txt":
        path.write_text(f"{words}\n\n" * 20_000)
    elif kind == "long_line.jsonl":
        path.write_text(json.dumps({"text": words * 6_000}) + "\n" + json.dumps({"text": "word"}))
    else:
        with gzip.open(path, "wt", compresslevel=1) as stream:
            for _ in range(200):
                stream.write((json.dumps({"text": words}) + "\n") * 100)
    command = [sys.executable, ROOT / "tools/prepare_data.py", path, "--tokenizer", tmp_path, "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--output", tmp_path / "out", "--valid-fraction", "0.0", "--separator", "auto"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    memory = PeakMemory(process)
    memory.start()
    assert process.wait(timeout=200) == 0
    memory.join()
    assert memory.peak < 700, f"{memory.peak:.0f} MiB"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pattern_that_never_ends_is_an_error_of_the_tokenizer(tmp_path, workers):
    """The library panics; the worker's error reaches the command, and nothing is left behind."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    inner.add_special_tokens(["</s>"])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    inner.save(str(tmp_path / "tokenizer.json"))
    with (tmp_path / "texts.jsonl").open("w") as stream:
        for number in range(400):
            stream.write(json.dumps({"text": f"b {number}" if number < 399 else "a" * 40 + "b"}) + "\n")
    texts = DocumentSource((tmp_path / "texts.jsonl",))
    with pytest.raises(DataError, match="too many steps"):
        prepare_text(TextRecipe(texts, str(tmp_path), valid_fraction=0), tmp_path / "out", workers)
    assert not list((tmp_path / "out").glob("train*"))


def test_a_file_at_which_the_library_panics_is_refused(tmp_path):
    model = {
        "type": "BPE",
        "vocab": {"a": 0, "b": 1, "ab": 2},
        "merges": [["a", "b"]],
        "continuing_subword_prefix": "###",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(DataError, match="a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)
