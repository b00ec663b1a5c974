"""Models in several GGUF files, as the package's writer splits them."""

from __future__ import annotations

import shutil

import gguf
import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from tests.checkpoint.gguf.tiny_gguf import SIZES, add_value, tensors, write


@pytest.fixture
def parts(tmp_path):
    """A folder with a model in parts."""
    folder = tmp_path / "parts"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=8)
    for key, value in SIZES.items():
        add_value(writer, f"llama.{key}", value)
    for name, tensor in tensors("llama").items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(folder.iterdir())) == 3
    return folder


def test_parts_are_one_model(parts, tmp_path):
    ours, plain = formats.open(parts), formats.open(write(tmp_path / "a.gguf"))
    assert ours.model_config == plain.model_config
    assert all(ours.read(key).equal(plain.read(key)) for key in plain.keys())  # noqa: SIM118
    assert formats.open(parts / "m-00001-of-00003.gguf").fingerprint() == ours.fingerprint()
    assert len(convert(ours, tmp_path / "hf", "hf").tensors) == 21


def problems_of(path) -> str:
    with pytest.raises(CheckpointError) as error:
        formats.open(path, "gguf")
    return str(error.value)


def test_parts_that_are_missing_or_of_another_model(parts, tmp_path):
    assert "expected the first part of the model, found part 00002" in problems_of(parts / "m-00002-of-00003.gguf")
    shutil.copy(parts / "m-00001-of-00003.gguf", tmp_path / "renamed.gguf")
    assert "a name that ends in -00001-of-00003.gguf" in problems_of(tmp_path / "renamed.gguf")
    (parts / "m-00003-of-00003.gguf").rename(tmp_path / "last")
    assert "m-00003-of-00003.gguf: expected a part of the model, found no such file" in problems_of(parts)
    shutil.copy(parts / "m-00002-of-00003.gguf", parts / "m-00003-of-00003.gguf")
    message = problems_of(parts)
    assert "split.no 2 and split.count 3" in message and "another in m-00003-of-00003.gguf" in message


def test_a_folder_of_two_models_is_refused(parts):
    write(parts / "other.gguf")
    assert "one *.gguf file, or the parts of one model" in problems_of(parts)


def test_a_count_that_is_no_count(tmp_path):
    assert "split.count" in problems_of(write(tmp_path / "a.gguf", changes={"split.count": "x"}))
    assert formats.open(write(tmp_path / "b.gguf", changes={"split.count": 1, "split.no": 0})).model_config
