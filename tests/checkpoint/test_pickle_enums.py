"""Enum members that Python 3.11.2 pickled as `getattr` are read on every Python; any other `getattr` is refused."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.formats.deepspeed.rank_files import STAND_INS
from megatron_ligo.checkpoint.formats.megatron_core import dcp_metadata
from megatron_ligo.checkpoint.io import torch_files
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.training.checkpointing.engine_files import ALLOWED_GLOBALS
from tests.checkpoint import hf_models


@pytest.fixture
def pickle_enums_by_name(monkeypatch):
    for enum in (ZeroStageEnum, _MEM_FORMAT_ENCODING):
        monkeypatch.setattr(enum, "__reduce_ex__", lambda member, _: (getattr, (type(member), member._name_)))


def test_zero_stage_of_an_engine(pickle_enums_by_name, tmp_path):
    torch.save({"stage": ZeroStageEnum.gradients, "tensor": torch.ones(2)}, tmp_path / "file.pt")
    assert b"getattr" in (tmp_path / "file.pt").read_bytes()
    assert torch_files.load(tmp_path / "file.pt", STAND_INS)["stage"] == 2
    assert torch_files.load(tmp_path / "file.pt", ALLOWED_GLOBALS)["stage"] is ZeroStageEnum.gradients


def test_memory_format_in_torchs_metadata(pickle_enums_by_name, tmp_path):
    _, folder = hf_models.saved(tmp_path / "hf")
    convert(formats.open(folder), tmp_path / "mcore", "mcore")
    (path,) = (tmp_path / "mcore").rglob(dcp_metadata.METADATA_FILE)
    assert b"getattr" in path.read_bytes()
    source, converted = formats.open(folder), formats.open(tmp_path / "mcore")
    assert torch.equal(converted.read("layers.0.q"), source.read("layers.0.q"))


class PickledGetattr:
    def __init__(self, *arguments: object):
        self.arguments = arguments

    def __reduce__(self):
        return getattr, self.arguments


@pytest.mark.parametrize(
    "arguments",
    [(ZeroStageEnum, "__class__"), (torch.Size, "__mro__"), (ZeroStageEnum, "no_stage"), ("text", "format")],
)
@pytest.mark.parametrize("allowed", [STAND_INS, ALLOWED_GLOBALS, ()], ids=["stand-ins", "records", "nothing"])
def test_any_other_getattr_is_refused(tmp_path, arguments, allowed):
    torch.save({"stage": PickledGetattr(*arguments)}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError):
        torch_files.load(tmp_path / "file.pt", allowed)


def test_no_file_changes_a_member(tmp_path):
    class Changed:
        def __reduce__(self):
            return ZeroStageEnum, (2,), {"_value_": 7}

    torch.save({"stage": Changed()}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="attributes of a ZeroStageEnum"):
        torch_files.load(tmp_path / "file.pt", ALLOWED_GLOBALS)
    assert ZeroStageEnum.gradients.value == 2
