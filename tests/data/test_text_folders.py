"""Which files of a folder are text: cards, caches, other kinds, links, shards."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_ligo.common.errors import DataError
from megatron_ligo.data.corpus.text_files import select_text_files


def write_json_lines(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"document {index}"}) + "\n" for index in range(100)))
    return path


def names(folder: Path, **options) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in select_text_files([str(folder)], **options).files]


def test_a_folder_with_a_card_and_data(tmp_path):
    (tmp_path / "README.md").write_text("# A card\n" * 9000)
    (tmp_path / "LICENSE.txt").write_text("a licence")
    (tmp_path / "dataset_info.json").write_text('{"text": "not a document"}')
    (tmp_path / ".gitattributes").write_text("*")
    (tmp_path / ".cache").mkdir()
    write_json_lines(tmp_path / ".cache" / "x.jsonl")
    write_json_lines(tmp_path / "data" / "more.jsonl")
    write_json_lines(tmp_path / "data" / "more.jsonl.gz")
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    expected = ["data/more.jsonl", "data/more.jsonl.gz", "data/train-00000-of-00001.parquet"]
    assert names(tmp_path) == expected
    (note,) = select_text_files([str(tmp_path)]).notes
    assert "README.md" in note and "81000 bytes" in note and "dataset_info.json" in note
    assert select_text_files([str(tmp_path / "README.md")]).files == (tmp_path / "README.md",)


def test_a_folder_of_text_keeps_its_readme(tmp_path):
    for name in ("README.md", "a.txt", "b.py"):
        (tmp_path / name).write_text("text")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "b.cpython-311.pyc").write_bytes(bytes(1000))
    assert names(tmp_path) == ["README.md", "a.txt", "b.py"]


def test_folders_that_datasets_has_saved(tmp_path):
    for name in ("data-00000-of-00001.arrow", "cache-1f.arrow", "old.arrow"):
        (tmp_path / "saved" / "train").mkdir(parents=True, exist_ok=True)
        (tmp_path / "saved" / "train" / name).write_bytes(b"arrow")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (tmp_path / "saved" / "train" / "state.json").write_text(json.dumps(state))
    assert names(tmp_path / "saved") == ["train/data-00000-of-00001.arrow"]
    (tmp_path / "saved" / "train" / "state.json").unlink()
    assert names(tmp_path / "saved") == ["train/data-00000-of-00001.arrow", "train/old.arrow"]


def test_json_files_of_a_folder_are_text_if_they_begin_with_one(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}\n')
    (tmp_path / "array.json").write_text(json.dumps([{"text": "a"}], indent=2))
    (tmp_path / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert names(tmp_path) == ["array.json", "c4-train.00000-of-01024.json.gz", "lines.json"]
    notes = select_text_files([str(tmp_path)]).notes
    assert "1 .json without a text under 'text' (14 bytes)" in notes[0]
    assert notes[1].endswith("c4-train: 1 of 1024 shards are there")


def test_skipped_files_that_outweigh_the_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 100)
    (tmp_path / "a.csv").write_text("x" * 60)
    assert names(tmp_path) == ["a.txt"]
    assert select_text_files([str(tmp_path)]).notes == (f"{tmp_path}: skipped 1 .csv (60 bytes)",)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.CSV").write_text("x" * 60)
    with pytest.raises(DataError) as error:
        names(tmp_path)
    (problem,) = error.value.problems
    assert problem.found == "100 bytes of text and 1 .CSV (60 bytes), 1 .csv (60 bytes)"
    assert "--allow-skipped" in problem.hint
    assert names(tmp_path, allow_skipped=True) == ["a.txt"]
    assert select_text_files([str(tmp_path / "a.txt")]).notes == ()


def test_a_link_and_its_target_count_once(tmp_path):
    """A download cache keeps the content under names without a suffix."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    blob = write_json_lines(tmp_path / "blobs" / "0123abcd")
    (tmp_path / "blobs" / "4567").write_text("more")
    (tmp_path / "snapshots" / "a.jsonl").symlink_to(blob)
    assert names(tmp_path) == ["snapshots/a.jsonl"]


def test_incomplete_shards_and_mixed_splits_are_said(tmp_path):
    for name in ("train-00000-of-00003", "train-00002-of-00003", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    shards, splits = select_text_files([str(tmp_path)]).notes
    assert shards == f"{tmp_path}/train: 2 of 3 shards are there"
    assert splits.startswith("the splits test, train are mixed")
    for name in ("dict/train", "dict/validation"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "data-00000-of-00001.arrow").write_bytes(b"arrow")
    (splits,) = select_text_files([str(tmp_path / "dict")]).notes
    assert splits.startswith("the splits train, validation are mixed")
