"""A whole conversion: all or nothing, bit for bit, one error for everything wrong, the source untouched."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ligo.checkpoint import formats, manifest
from megatron_ligo.checkpoint.convert import convert, open_source
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.io import parallel_writer
from megatron_ligo.checkpoint.reader import MOMENTS, Reader
from megatron_ligo.checkpoint.staging import Staging
from megatron_ligo.common.errors import CheckpointError, ConfigError, MachineError, user_message
from tests.checkpoint import hf_models

WRITERS = ["hf", "universal"]


class WithMoments(Reader):
    """A source that has optimizer state."""

    format = "memory"
    path = None
    step = 7
    has_moments = True

    def __init__(self, source: Reader):
        self.source, self.model_config, self.carried = source, source.model_config, source.carried

    def info(self, key):
        return self.source.info(key)

    def read(self, key, kind="weight"):
        weight = self.source.read(key)
        return weight if kind == "weight" else weight.float() ** 2 + MOMENTS.index(kind)


def fill(disk, left):
    """Fills a disk up to `left` free bytes, or fewer if it has fewer."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(max(room.f_bavail * room.f_bsize - left, 0)))


def snapshot(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_there_and_back(tmp_path, to, tied, model_type):
    _, folder = hf_models.saved(tmp_path / "a", model_type, tied=tied)
    convert(formats.open(folder), tmp_path / "b", to)
    convert(formats.open(tmp_path / "b"), tmp_path / "c", "hf")
    hf_models.assert_same(formats.open(folder), formats.open(tmp_path / "c"))
    assert load_file(folder / "model.safetensors").keys() == load_file(tmp_path / "c" / "model.safetensors").keys()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c"]


def test_moments_are_written_or_reported_as_left_behind(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = WithMoments(formats.open(folder))
    manifest_of_b = convert(source, tmp_path / "b", "universal")
    reader = formats.open(tmp_path / "b")
    assert (reader.step, reader.has_moments, manifest_of_b.left_behind) == (7, True, [])
    for key, kind in itertools.product(source.keys(), MOMENTS):
        assert torch.equal(reader.read(key, kind), source.read(key, kind)), key
    assert convert(reader, tmp_path / "c", "hf").left_behind == ["optimizer state"]
    (left,) = convert(reader, tmp_path / "e", "mcore").left_behind
    assert "optimizer state (the source does not state betas and eps" in left
    assert not formats.open(tmp_path / "e").has_moments
    (left,) = convert(reader, tmp_path / "f", "universal", WriteOptions(extra={"moments": "none"})).left_behind
    assert left == "optimizer state (moments = none)"
    assert not convert(source, tmp_path / "d", "hf").tensors["embed"].keys() & set(MOMENTS)


def test_a_cast_equals_torchs_cast(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    convert(source, tmp_path / "b", "hf", WriteOptions(dtype=torch.bfloat16))
    reader = formats.open(tmp_path / "b")
    for key in source.keys():  # noqa: SIM118 - no dict
        assert hf_models.same_bits(reader.read(key), source.read(key).bfloat16())


def test_every_non_finite_number_is_reported_and_no_file_stays(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    state["lm_head.weight"][0, :2] = float("inf")
    state["model.embed_tokens.weight"][1, 1] = 1e30
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        convert(formats.open(folder), tmp_path / "b", "universal")
    problems = {problem.where: problem.found for problem in error.value.problems}
    assert problems == {"final_norm (weight)": "1 NaN", "head (weight)": "2 Inf"}
    with pytest.raises(CheckpointError) as error:
        convert(formats.open(folder), tmp_path / "b", "hf", WriteOptions(dtype=torch.float16))
    assert "embed (weight)" in {problem.where for problem in error.value.problems}
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_headers_and_numbers_are_reported_in_one_error(tmp_path):
    """The headers alone would be refused; the error lists non-finite numbers too."""
    _, folder = hf_models.saved(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    norm = state["model.norm.weight"]
    parts = [state, {"model.norm.weight": norm, "model.more": torch.ones(2)}]
    del state["model.layers.0.self_attn.k_proj.weight"]
    state["model.layers.0.mlp.up_proj.weight"] = torch.full((52, 47), float("inf"))
    state["lm_head.weight"][0, :2] = float("nan")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, {"format": "pt"})
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError) as error:
        open_source(folder)
    key, up, norm = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    problems = [(problem.where, problem.expected, problem.found) for problem in error.value.problems]
    assert sorted(problems) == sorted(
        [
            (norm, "one tensor of that name", f"two, in {names[0]} and {names[1]}"),
            (key, "a tensor of shape (20, 48)", "nothing"),
            (f"{up} ({names[0]})", "shape (52, 48)", "(52, 47)"),
            (f"model.more ({names[1]})", "no such tensor", "one"),
            ("lm_head.weight", "finite numbers", "2 NaN"),
            (up, "finite numbers", f"{52 * 47} Inf"),
        ]
    )


@pytest.mark.parametrize("to", ["megatron", "fairscale", "deepspeed"])
def test_differing_replicas_are_reported_with_non_finite_numbers(tmp_path, to):
    _, folder = hf_models.saved(tmp_path / "a", num_attention_heads=8, num_key_value_heads=4, head_dim=6)
    convert(formats.open(folder), tmp_path / "b", to, WriteOptions(tp=4))
    files = sorted(file for file in (tmp_path / "b").rglob("*") if file.suffix in (".pt", ".pth"))
    for file, factor in zip(files, (1, 2, 1, 3), strict=True):
        state = torch.load(file, weights_only=False)
        tensors = state.get("model") or state.get("module") or state
        norms = [tensor for name, tensor in tensors.items() if "norm" in name and isinstance(tensor, torch.Tensor)]
        for norm in norms:
            norm.mul_(factor)
        if file == files[0]:
            (embedding,) = [tensor for name, tensor in tensors.items() if "embeddings" in name]
            embedding[0, :4] = float("nan")
        torch.save(state, file)
    with pytest.raises(CheckpointError) as error:
        convert(formats.open(tmp_path / "b"), tmp_path / "c", "hf")
    *replicas, non_finite = sorted(error.value.problems, key=lambda problem: problem.found == "4 NaN")
    assert len(replicas) == len(norms) == 5
    assert {(problem.expected, problem.found) for problem in replicas} == {
        ("the bits of rank 0", "other bits on rank 1, 3")
    }
    assert (non_finite.where, non_finite.found) == ("embed (weight)", "4 NaN")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_the_source_is_only_read(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    before = snapshot(folder)
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    times = {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}
    for to in WRITERS:
        convert(formats.open(folder), tmp_path / to, to)
    assert snapshot(folder) == before
    assert times == {file: file.stat().st_mtime_ns for file in [folder, *folder.iterdir()]}


def test_existing_targets(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    target = tmp_path / "b"
    target.mkdir()
    first = convert(source, target, "hf")
    inode = target.stat().st_ino
    assert convert(source, target, "hf") == first
    assert target.stat().st_ino == inode
    other = WriteOptions(dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as error:
        convert(source, target, "hf", other)
    assert error.value.problems[0].found == "another conversion"
    convert(source, target, "hf", other, overwrite=True)
    assert formats.open(target).info("embed").dtype == torch.bfloat16
    shutil.copytree(folder, tmp_path / "foreign")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError) as error:
            convert(source, tmp_path / "foreign", "hf", overwrite=overwrite)
        assert error.value.problems[0].where == f"{tmp_path / 'foreign'}"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "file", "hf", overwrite=True)
    assert error.value.problems[0].found == "a file"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "file", "foreign"]


def test_a_target_with_changed_files_is_another_conversion(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "hf")
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        convert(formats.open(folder), tmp_path / "b", "hf")
    assert error.value.problems[0].where == f"{tmp_path / 'b' / 'config.json'}"


@pytest.mark.parametrize("place", ["a", "a/inside", "."])
def test_the_target_lies_outside_of_the_source(tmp_path, place):
    _, folder = hf_models.saved(tmp_path / "a")
    with pytest.raises(ConfigError) as error:
        convert(formats.open(folder), tmp_path / place, "hf")
    assert error.value.problems[0].where == f"{tmp_path / place}"


def test_the_old_target_returns_after_a_crash_between_the_renames(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "hf")
    (tmp_path / "b").rename(tmp_path / ".b.replaced")
    convert(formats.open(folder), tmp_path / "b", "hf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_two_processes_cannot_write_one_target(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    partial = tmp_path / ".b.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError) as error:
            convert(formats.open(folder), tmp_path / "b", "hf")
        assert error.value.problems[0].where == f"{tmp_path / 'b'}"
    convert(formats.open(folder), tmp_path / "b", "hf")


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    _, folder = hf_models.saved(tmp_path / "a")
    monkeypatch.setattr(fcntl, "flock", flock)
    convert(formats.open(folder), tmp_path / "b", "hf")
    hf_models.assert_same(formats.open(folder), formats.open(tmp_path / "b"))
    assert f"{tmp_path / '.b.partial'}: its file system has no locks" in caplog.text


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, small_disk):
    _, folder = hf_models.saved(tmp_path / "a")
    fill(small_disk, 40_000)
    with pytest.raises(MachineError) as error:
        convert(formats.open(folder), small_disk / "b", "hf")
    assert error.value.problems[0].where == f"{small_disk / 'b'}"
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("to", formats.writers())
def test_the_space_checked_for_is_the_size_of_the_files(tmp_path, monkeypatch, to):
    """Includes a tied model's output and moments, but not zeros that stay holes."""
    _, folder = hf_models.saved(tmp_path / "a", tied=True, hidden_size=480, head_dim=80, vocab_size=2000)
    checked = []
    monkeypatch.setattr(Staging, "check_space", lambda _, needed: checked.append(needed))
    convert(formats.open(folder), tmp_path / "b", to)
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "b").rglob("*") if file.is_file())
    assert checked[0] <= used < checked[0] * 1.1 + 4096 * 2 * len(list((tmp_path / "b").rglob("*")))


def test_a_disk_that_fills_up_leaves_no_target_and_the_next_run_resumes(tmp_path, small_disk, monkeypatch):
    """Chunk by chunk: the last write finds room for a part of its chunk only."""
    monkeypatch.setattr(parallel_writer, "CHUNK", 5000)
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    read, remaining = source.read, iter((30_000,))

    def read_and_fill(key, kind="weight"):
        if key == "layers.1.q":
            for left in remaining:
                fill(small_disk, left)
        return read(key, kind)

    source.read = read_and_fill
    with pytest.raises(OSError, match="No space") as error:
        convert(source, small_disk / "b", "universal")
    assert str(small_disk / ".b.partial") in user_message(error.value)
    (small_disk / "filler").unlink()
    assert [path.name for path in small_disk.iterdir()] == [".b.partial"]
    read_again = []
    source.read = lambda key, kind="weight": read_again.append(key) or read(key, kind)
    convert(source, small_disk / "b", "universal")
    assert 0 < len(read_again) < len(list(source.keys()))
    convert(formats.open(folder), small_disk / "c", "universal")
    one, other = snapshot(small_disk / "b"), snapshot(small_disk / "c")
    assert one == other and [path.name for path in small_disk.iterdir() if path.name.startswith(".")] == []


def test_unsupported_options_are_refused(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    for to in ("gguf", "huggingface"):
        with pytest.raises(ConfigError) as error:
            convert(source, tmp_path / "b", to)
        assert to in error.value.problems[0].where
    cases = [
        ("hf", WriteOptions(tp=2), "layout", "tp 2, pp 1"),
        ("universal", WriteOptions(dtype=torch.bfloat16), "dtype", "torch.bfloat16"),
        ("hf", WriteOptions(workers=0), "workers", "0"),
    ]
    for to, options, where, result in cases:
        with pytest.raises(ConfigError) as error:
            convert(source, tmp_path / "b", to, options)
        (problem,) = error.value.problems
        assert (problem.where, problem.found) == (where, result)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_extra_files_are_in_the_manifest(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    written = convert(formats.open(folder), tmp_path / "b", "hf", extra_files={"growth.json": {"step": 3}})
    assert json.loads((tmp_path / "b" / "growth.json").read_text()) == {"step": 3}
    assert "growth.json" in written.files
    assert manifest.load_manifest(tmp_path / "b") == written


def test_progress_ends_at_the_total(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    seen = []
    convert(formats.open(folder), tmp_path / "b", "hf", progress=lambda *numbers: seen.append(numbers))
    total = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
