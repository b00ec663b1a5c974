"""Every broken checkpoint is refused with one error that says what is wrong, and nothing is executed."""

from __future__ import annotations

import shutil

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import LigoError
from megatron_ligo.testing.fuzz import engine_samples
from tests.checkpoint import hf_models
from tests.checkpoint.bad_checkpoints import deepspeed, fairscale, hf, hf_files, mcore, megatron, pipeline, universal


def named(builders: dict) -> dict:
    return {"argvalues": builders.values(), "ids": builders.keys()}


def assert_refused(folder, form, words) -> None:
    with pytest.raises(LigoError) as caught:
        reader = formats.open(folder, form)
        for key in reader.keys():  # noqa: SIM118 - no dict
            for kind in (WEIGHT, *MOMENTS) if reader.has_moments else (WEIGHT,):
                reader.read(key, kind)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("builder", **named({**hf.hf, **hf_files.single}))
def test_hugging_face(tmp_path, builder):
    _, folder = hf_models.saved(tmp_path / "a")
    formats.open(folder)
    assert_refused(folder, "hf", builder(folder))


@pytest.mark.parametrize("builder", **named(hf_files.sharded))
def test_sharded_hugging_face(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "hf", WriteOptions(extra={"shard_bytes": 20_000}))
    formats.open(folder)
    assert_refused(folder, "hf", builder(folder))


@pytest.mark.parametrize("builder", **named(universal.universal))
def test_universal(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "universal")
    formats.open(folder)
    assert_refused(folder, "universal", builder(folder))
    assert not universal.Evil.ran


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """Checkpoints of Megatron's with Adam's state, by format."""
    root = tmp_path_factory.mktemp("stepped")
    _, whole = hf_models.saved(root / "whole", tied=True)
    convert(formats.open(whole), root / "engine", "deepspeed", WriteOptions(tp=2))
    engine_samples.add_optimizer(root / "engine" / deepspeed.TAG, 1)
    for to, options in (("mcore", WriteOptions()), ("megatron", WriteOptions(tp=2, pp=2))):
        assert convert(formats.open(root / "engine"), root / to, to, options).left_behind == []
        assert formats.open(root / to).has_moments
    return root


@pytest.mark.parametrize("builder", **named(mcore.mcore))
def test_megatron_core(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "mcore")
    formats.open(folder)
    assert_refused(folder, "mcore", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize("builder", **named(mcore.stepped))
def test_adams_state_of_megatron_core(tmp_path, stepped, builder):
    folder = shutil.copytree(stepped / "mcore", tmp_path / "a")
    assert_refused(folder, "mcore", builder(folder))


@pytest.mark.parametrize("builder", **named({**megatron.megatron, **megatron.stepped}))
def test_megatron(tmp_path, stepped, builder):
    folder = shutil.copytree(stepped / "megatron", tmp_path / "a")
    assert_refused(folder, "megatron", builder(folder))
    assert not universal.Evil.ran


def test_moments_that_are_no_numbers(tmp_path, stepped):
    """They are told of together with what else is wrong."""
    folder = shutil.copytree(stepped / "megatron", tmp_path / "a")
    words = megatron.moments_of_nan(folder)
    with pytest.raises(LigoError) as caught:
        convert(formats.open(folder), tmp_path / "b", "universal")
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("builder", **named(fairscale.fairscale))
def test_fairscale(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole", head_dim=8, tied=True)
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "fairscale", WriteOptions(tp=2))
    formats.open(folder)
    assert_refused(folder, "fairscale", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize(
    "stage, builder",
    [(1, b) for b in deepspeed.zero1.values()] + [(3, b) for b in deepspeed.zero3.values()],
    ids=[*deepspeed.zero1, *deepspeed.zero3],
)
def test_deepspeed(tmp_path, stage, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "deepspeed", WriteOptions(tp=2))
    engine_samples.add_optimizer(folder / deepspeed.TAG, stage)
    formats.open(folder)
    assert_refused(folder, "deepspeed", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize("builder", **named(pipeline.pipeline))
def test_pipeline(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "pipeline", WriteOptions(tp=2, pp=2))
    formats.open(folder)
    assert_refused(folder, "pipeline", builder(folder))
    assert not universal.Evil.ran


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(LigoError, match="nothing there"):
        formats.open(tmp_path / "a")
    with pytest.raises(LigoError, match="--from"):
        formats.open(tmp_path)
    with pytest.raises(LigoError, match="Did you mean 'hf'"):
        formats.open(tmp_path, "hff")


def test_two_formats_in_one_folder(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    (folder / "latest_universal").write_text("x")
    with pytest.raises(LigoError, match="hf and universal"):
        formats.open(folder)
    formats.open(folder, "hf")
