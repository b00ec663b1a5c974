"""Conversion as a whole: all or nothing, bit for bit, one error for all faults, the source untouched."""

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
    """All room of a disk but so many bytes, or what of it there is."""
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


def test_moments_go_along_or_are_said_to_be_left(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = WithMoments(formats.open(folder))
    made = convert(source, tmp_path / "b", "universal")
    reader = formats.open(tmp_path / "b")
    assert (reader.step, reader.has_moments, made.left_behind) == (7, True, [])
    for key, kind in itertools.product(source.keys(), MOMENTS):
        assert torch.equal(reader.read(key, kind), source.read(key, kind)), key
    assert convert(reader, tmp_path / "c", "hf").left_behind == ["optimizer state"]
    (left,) = convert(reader, tmp_path / "e", "mcore").left_behind
    assert "optimizer state (the source does not state betas and eps" in left
    assert not formats.open(tmp_path / "e").has_moments
    (left,) = convert(reader, tmp_path / "f", "universal", WriteOptions(extra={"moments": "none"})).left_behind
    assert left == "optimizer state (moments = none)"
    assert not convert(source, tmp_path / "d", "hf").tensors["embed"].keys() & set(MOMENTS)


def test_a_cast_is_what_torch_makes_of_it(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    convert(source, tmp_path / "b", "hf", WriteOptions(dtype=torch.bfloat16))
    reader = formats.open(tmp_path / "b")
    for key in source.keys():  # noqa: SIM118 - no dict
        assert hf_models.same_bits(reader.read(key), source.read(key).bfloat16())


def test_every_bad_number_is_told_and_nothing_is_left(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][3] = float("nan")
    state["lm_head.weight"][0, :2] = float("inf")
    state["model.embed_tokens.weight"][1, 1] = 1e30
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        convert(formats.open(folder), tmp_path / "b", "universal")
    assert "final_norm" in str(caught.value)
    assert "2 Inf" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"embed \(weight\)"):
        convert(formats.open(folder), tmp_path / "b", "hf", WriteOptions(dtype=torch.float16))
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_all_that_is_wrong_is_one_error(tmp_path):
    """Headers and numbers alike, though the headers alone would be refused."""
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
    with pytest.raises(CheckpointError, match="6 problems") as caught:
        open_source(folder)
    for line in (
        "model.norm.weight: expected one tensor of that name, found two",
        "model.layers.0.self_attn.k_proj.weight: expected a tensor of shape (20, 48), found nothing",
        "model.layers.0.mlp.up_proj.weight (model-00001-of-00002.safetensors): expected shape (52, 48), found (52, 47)",
        "model.more (model-00002-of-00002.safetensors): expected no such tensor",
        "lm_head.weight: expected finite numbers, found 2 NaN",
        f"model.layers.0.mlp.up_proj.weight: expected finite numbers, found {52 * 47} Inf",
    ):
        assert line in str(caught.value)


@pytest.mark.parametrize("to", ["megatron", "fairscale", "deepspeed"])
def test_all_replicas_that_differ_are_told_with_the_bad_numbers(tmp_path, to):
    _, folder = hf_models.saved(tmp_path / "a", num_attention_heads=8, num_key_value_heads=4, head_dim=6)
    convert(formats.open(folder), tmp_path / "b", to, WriteOptions(tp=4))
    files = sorted(file for file in (tmp_path / "b").rglob("*") if file.suffix in (".pt", ".pth"))
    for file, factor in zip(files, (1, 2, 1, 3), strict=True):
        state = torch.load(file, weights_only=False)
        held = state.get("model") or state.get("module") or state
        norms = [tensor for name, tensor in held.items() if "norm" in name and isinstance(tensor, torch.Tensor)]
        for norm in norms:
            norm.mul_(factor)
        if file == files[0]:
            (embedding,) = [tensor for name, tensor in held.items() if "embeddings" in name]
            embedding[0, :4] = float("nan")
        torch.save(state, file)
    with pytest.raises(CheckpointError, match=f"{len(norms) + 1} faults") as caught:
        convert(formats.open(tmp_path / "b"), tmp_path / "c", "hf")
    assert str(caught.value).count("the bits of rank 0, found others on rank 1, 3") == len(norms) == 5
    assert "embed (weight): expected finite numbers, found 4 NaN" in str(caught.value)
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


def test_targets_that_are_there(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    target = tmp_path / "b"
    target.mkdir()
    first = convert(source, target, "hf")
    inode = target.stat().st_ino
    assert convert(source, target, "hf") == first
    assert target.stat().st_ino == inode
    other = WriteOptions(dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(source, target, "hf", other)
    convert(source, target, "hf", other, overwrite=True)
    assert formats.open(target).info("embed").dtype == torch.bfloat16
    shutil.copytree(folder, tmp_path / "foreign")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="a folder of others"):
            convert(source, tmp_path / "foreign", "hf", overwrite=overwrite)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="a file"):
        convert(source, tmp_path / "file", "hf", overwrite=True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "file", "foreign"]


def test_a_target_whose_files_changed_is_not_taken_for_done(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "hf")
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--overwrite"):
        convert(formats.open(folder), tmp_path / "b", "hf")


@pytest.mark.parametrize("place", ["a", "a/inside", "."])
def test_the_target_is_apart_from_the_source(tmp_path, place):
    _, folder = hf_models.saved(tmp_path / "a")
    with pytest.raises(ConfigError, match="apart from the source"):
        convert(formats.open(folder), tmp_path / place, "hf")


def test_an_old_target_comes_back_if_the_new_one_had_not_taken_its_place(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    convert(formats.open(folder), tmp_path / "b", "hf")
    (tmp_path / "b").rename(tmp_path / ".b.replaced")
    convert(formats.open(folder), tmp_path / "b", "hf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_two_at_once(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    partial = tmp_path / ".b.partial"
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process"):
            convert(formats.open(folder), tmp_path / "b", "hf")
    convert(formats.open(folder), tmp_path / "b", "hf")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    _, folder = hf_models.saved(tmp_path / "a")
    monkeypatch.setattr(fcntl, "flock", flock)
    convert(formats.open(folder), tmp_path / "b", "hf")
    hf_models.assert_same(formats.open(folder), formats.open(tmp_path / "b"))
    assert f"{tmp_path / '.b.partial'}: its file system has no locks" in caplog.text


def test_a_full_disk_is_seen_before_the_start(tmp_path, small_disk):
    _, folder = hf_models.saved(tmp_path / "a")
    fill(small_disk, 40_000)
    with pytest.raises(MachineError, match="bytes free on its disk"):
        convert(formats.open(folder), small_disk / "b", "hf")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("to", formats.writers())
def test_the_space_that_is_asked_for_is_what_the_files_take(tmp_path, monkeypatch, to):
    """A tied model's output and moments included, zeros that are holes not."""
    _, folder = hf_models.saved(tmp_path / "a", tied=True, hidden_size=480, head_dim=80, vocab_size=2000)
    asked = []
    monkeypatch.setattr(Staging, "check_space", lambda _, needed: asked.append(needed))
    convert(formats.open(folder), tmp_path / "b", to)
    used = sum(file.stat().st_blocks * 512 for file in (tmp_path / "b").rglob("*") if file.is_file())
    assert asked[0] <= used < asked[0] * 1.1 + 4096 * 2 * len(list((tmp_path / "b").rglob("*")))


def test_a_disk_that_fills_up_leaves_no_target_and_the_next_run_goes_on(tmp_path, small_disk, monkeypatch):
    """Chunk by chunk: the last one that finds room finds too little of it."""
    monkeypatch.setattr(parallel_writer, "CHUNK", 5000)
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    read, lost = source.read, iter((30_000,))

    def filled(key, kind="weight"):
        if key == "layers.1.q":
            for left in lost:
                fill(small_disk, left)
        return read(key, kind)

    source.read = filled
    with pytest.raises(OSError, match="No space") as found:
        convert(source, small_disk / "b", "universal")
    assert str(small_disk / ".b.partial") in user_message(found.value)
    (small_disk / "filler").unlink()
    assert [path.name for path in small_disk.iterdir()] == [".b.partial"]
    read_again = []
    source.read = lambda key, kind="weight": read_again.append(key) or read(key, kind)
    convert(source, small_disk / "b", "universal")
    assert 0 < len(read_again) < len(list(source.keys()))
    convert(formats.open(folder), small_disk / "c", "universal")
    one, other = snapshot(small_disk / "b"), snapshot(small_disk / "c")
    assert one == other and [path.name for path in small_disk.iterdir() if path.name.startswith(".")] == []


def test_what_a_format_does_not_take_is_refused(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    source = formats.open(folder)
    for to in ("gguf", "huggingface"):
        with pytest.raises(ConfigError, match=to):
            convert(source, tmp_path / "b", to)
    cases = [
        ("hf", WriteOptions(tp=2), "layout", "tp 2, pp 1"),
        ("universal", WriteOptions(dtype=torch.bfloat16), "dtype", "torch.bfloat16"),
        ("hf", WriteOptions(workers=0), "workers", "0"),
    ]
    for to, options, where, found in cases:
        with pytest.raises(ConfigError) as error:
            convert(source, tmp_path / "b", to, options)
        (problem,) = error.value.problems
        assert (problem.where, problem.found) == (where, found)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_more_files_beside(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    made = convert(formats.open(folder), tmp_path / "b", "hf", extra_files={"growth.json": {"step": 3}})
    assert json.loads((tmp_path / "b" / "growth.json").read_text()) == {"step": 3}
    assert "growth.json" in made.files
    assert manifest.load_manifest(tmp_path / "b") == made


def test_progress_ends_at_the_whole(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    seen = []
    convert(formats.open(folder), tmp_path / "b", "hf", progress=lambda *numbers: seen.append(numbers))
    total = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
