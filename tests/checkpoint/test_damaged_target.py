"""A conversion that is there already is compared by content before it is left as it is."""

from __future__ import annotations

import json

import pytest

from megatron_ligo.checkpoint import formats, manifest
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError
from megatron_ligo.common.file_digest import SEAL
from tests.checkpoint import hf_models


@pytest.mark.parametrize("to", ["hf", "universal", "mcore"])
def test_a_damaged_target_is_not_left_as_it_is(tmp_path, to):
    _, folder = hf_models.saved(tmp_path / "a")
    source, target = formats.open(folder), tmp_path / "b"
    first = convert(source, target, to)
    path = max((file for file in target.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        convert(source, target, to)
    assert [problem.where for problem in error.value.problems] == [str(path)]
    assert convert(source, target, to, overwrite=True) == first
    assert path.read_bytes() != content
    # The manifest of an earlier version has digests of tensors only.
    manifest_path = target / manifest.MANIFEST
    record = json.loads(manifest_path.read_text())
    del record["digests"], record[SEAL]
    manifest_path.write_text(json.dumps({**record, "version": 1}))
    assert convert(source, target, to).digests == {}
