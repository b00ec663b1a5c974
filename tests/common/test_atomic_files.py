"""Files and folders appear complete or not at all, also if a write fails half-way."""

import os

import pytest

from megatron_ligo.common import atomic_files


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_a_failed_write_leaves_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_files.write_json(path, {"step": 1})
    assert atomic_files.read_json(path) == {"step": 1}

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError):
        atomic_files.write_json(path, {"step": 2})
    assert contents(tmp_path) == {"a.json": '{\n  "step": 1\n}\n'}


@pytest.mark.parametrize("published", [False, True])
def test_an_interrupted_replacement_is_undone_or_completed(tmp_path, published):
    new, target, backup = (tmp_path / name for name in ("new", "target", "backup"))
    for folder in (new, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    target.rename(backup)
    if published:
        new.rename(target)
    atomic_files.restore_backup(backup, target)
    assert (target / "name").read_text() == ("new" if published else "target")
    assert not backup.exists()


def test_a_replaced_folder_leaves_no_backup(tmp_path):
    new, target, backup = (tmp_path / name for name in ("new", "target", "backup"))
    for folder in (new, target):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    atomic_files.fsync_tree(new)
    atomic_files.replace_folder(new, target, backup)
    assert (target / "name").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 400, "{", "\xff"])
def test_what_is_not_json_is_a_value_error(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError):
        atomic_files.read_json(path)


def test_pipes_and_folders_are_refused_without_reading_them(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError):
        atomic_files.read_text(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError) as raised:
        atomic_files.read_text(tmp_path)
    assert raised.value.filename == str(tmp_path)
