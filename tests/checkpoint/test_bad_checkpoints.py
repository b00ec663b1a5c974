"""A damaged or hostile checkpoint is refused with one error that reports every problem; nothing in it is executed."""

from __future__ import annotations

import shutil

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.format import WriteOptions
from megatron_ligo.checkpoint.reader import MOMENTS, WEIGHT
from megatron_ligo.common.errors import CheckpointError, ConfigError, LigoError
from megatron_ligo.testing.fuzz import engine_samples
from tests.checkpoint import hf_models
from tests.checkpoint.bad_checkpoints import (
    Exactly,
    deepspeed,
    fairscale,
    hf,
    hf_files,
    mcore,
    megatron,
    pipeline,
    problem,
    universal,
)


def by_name(builders: dict) -> dict:
    return {"argvalues": builders.values(), "ids": builders.keys()}


def assert_reported(error: LigoError, patterns) -> None:
    if isinstance(patterns, Exactly):
        assert len(error.problems) == len(patterns), str(error)
    for pattern in patterns:
        if isinstance(pattern, str):
            assert pattern in str(error), str(error)
        else:
            assert any(pattern.matches(problem) for problem in error.problems), f"{pattern}\n{error}"


def assert_refused(folder, format_name, patterns) -> None:
    """Opening the checkpoint, or reading all of its tensors, reports the problems."""
    with pytest.raises(LigoError) as error:
        reader = formats.open(folder, format_name)
        for key in reader.keys():  # noqa: SIM118 - no dict
            for kind in (WEIGHT, *MOMENTS) if reader.has_moments else (WEIGHT,):
                reader.read(key, kind)
    assert_reported(error.value, patterns)


@pytest.mark.parametrize("builder", **by_name({**hf.hf, **hf_files.single}))
def test_hugging_face(tmp_path, builder):
    _, folder = hf_models.saved(tmp_path / "a")
    formats.open(folder)
    assert_refused(folder, "hf", builder(folder))


@pytest.mark.parametrize("builder", **by_name(hf_files.sharded))
def test_sharded_hugging_face(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "hf", WriteOptions(extra={"shard_bytes": 20_000}))
    formats.open(folder)
    assert_refused(folder, "hf", builder(folder))


@pytest.mark.parametrize("builder", **by_name(universal.universal))
def test_universal(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "universal")
    formats.open(folder)
    assert_refused(folder, "universal", builder(folder))
    assert not universal.Evil.ran


@pytest.fixture(scope="module")
def with_adam_state(tmp_path_factory):
    """Folder of Megatron-core's and Megatron-LM's checkpoints with Adam's state, by format name."""
    root = tmp_path_factory.mktemp("with_adam_state")
    _, whole = hf_models.saved(root / "whole", tied=True)
    convert(formats.open(whole), root / "engine", "deepspeed", WriteOptions(tp=2))
    engine_samples.write_engine_files(root / "engine" / deepspeed.TAG, 1)
    for format_name, options in (("mcore", WriteOptions()), ("megatron", WriteOptions(tp=2, pp=2))):
        assert convert(formats.open(root / "engine"), root / format_name, format_name, options).left_behind == []
        assert formats.open(root / format_name).has_moments
    return root


@pytest.mark.parametrize("builder", **by_name(mcore.mcore))
def test_megatron_core(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "mcore")
    formats.open(folder)
    assert_refused(folder, "mcore", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize("builder", **by_name(mcore.adam_state))
def test_adams_state_of_megatron_core(tmp_path, with_adam_state, builder):
    folder = shutil.copytree(with_adam_state / "mcore", tmp_path / "a")
    assert_refused(folder, "mcore", builder(folder))


@pytest.mark.parametrize("builder", **by_name({**megatron.megatron, **megatron.adam_state}))
def test_megatron(tmp_path, with_adam_state, builder):
    folder = shutil.copytree(with_adam_state / "megatron", tmp_path / "a")
    assert_refused(folder, "megatron", builder(folder))
    assert not universal.Evil.ran


def test_moments_that_are_not_finite(tmp_path, with_adam_state):
    """Problems of several moments are reported together."""
    folder = shutil.copytree(with_adam_state / "megatron", tmp_path / "a")
    patterns = megatron.set_moments_not_finite(folder)
    with pytest.raises(CheckpointError) as error:
        convert(formats.open(folder), tmp_path / "b", "universal")
    assert_reported(error.value, patterns)


@pytest.mark.parametrize("builder", **by_name(fairscale.fairscale))
def test_fairscale(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole", head_dim=8, tied=True)
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "fairscale", WriteOptions(tp=2))
    formats.open(folder)
    assert_refused(folder, "fairscale", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize(
    "zero_stage, builder",
    [(1, builder) for builder in deepspeed.zero1.values()] + [(3, builder) for builder in deepspeed.zero3.values()],
    ids=[*deepspeed.zero1, *deepspeed.zero3],
)
def test_deepspeed(tmp_path, zero_stage, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "deepspeed", WriteOptions(tp=2))
    engine_samples.write_engine_files(folder / deepspeed.TAG, zero_stage)
    formats.open(folder)
    assert_refused(folder, "deepspeed", builder(folder))
    assert not universal.Evil.ran


@pytest.mark.parametrize("builder", **by_name(pipeline.pipeline))
def test_pipeline(tmp_path, builder):
    _, whole = hf_models.saved(tmp_path / "whole")
    folder = tmp_path / "a"
    convert(formats.open(whole), folder, "pipeline", WriteOptions(tp=2, pp=2))
    formats.open(folder)
    assert_refused(folder, "pipeline", builder(folder))
    assert not universal.Evil.ran


def test_folder_without_checkpoint(tmp_path):
    with pytest.raises(CheckpointError) as error:
        formats.open(tmp_path / "a")
    assert_reported(error.value, problem(where=f"{tmp_path / 'a'}", found="nothing"))
    with pytest.raises(CheckpointError, match="--from"):
        formats.open(tmp_path)


def test_unknown_format(tmp_path):
    with pytest.raises(ConfigError, match="'hf'"):
        formats.open(tmp_path, "hff")


def test_two_formats_in_one_folder(tmp_path):
    _, folder = hf_models.saved(tmp_path / "a")
    (folder / "latest_universal").write_text("x")
    with pytest.raises(CheckpointError) as error:
        formats.open(folder)
    assert_reported(error.value, problem(where=f"{folder}", found="hf and universal"))
    formats.open(folder, "hf")
