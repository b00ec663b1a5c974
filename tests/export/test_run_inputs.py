"""Large files that are read slowly are bound by samples; a full check binds all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ligo.common import file_digest
from megatron_ligo.common.errors import DataError
from megatron_ligo.common.file_digest import seal
from megatron_ligo.distributed import digest_cache
from megatron_ligo.distributed.digest_cache import SAMPLED, WHOLE, DigestCache
from megatron_ligo.export import chain, run_inputs
from megatron_ligo.export.pretrain_record import write_pretrain_record
from megatron_ligo.export.run_inputs import InputPolicy, RunInputs

NAME = "data.train 1.bin"


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """A file that counts as large, on a disk that counts as slow."""
    monkeypatch.setattr(digest_cache, "ALWAYS_WHOLE", 1000)
    monkeypatch.setattr(file_digest, "SAMPLE_BLOCK", 16)
    monkeypatch.setattr(file_digest, "SAMPLE_BLOCKS", 8)
    monkeypatch.setattr(DigestCache, "_measure_rate", lambda self, path: 1e8)
    path = tmp_path / "large.bin"
    path.write_bytes(bytes(5000))
    return path


def bind(path: Path, saved: dict | None, **policy: bool) -> dict:
    """Compares the file with the inputs of a run and returns those that it saves."""
    chosen = InputPolicy(**policy)
    inputs = RunInputs(DigestCache(recompute=chosen.full_check), chosen, saved)
    inputs.add_files({NAME: path})
    state: dict = {}
    inputs.check(step=3)
    inputs.save_to(state)
    return state


def change(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def verify(folder: Path, inputs: dict) -> chain.ChainReport:
    write_pretrain_record(folder, seal({run_inputs.INPUTS: inputs}))
    return chain.verify_runs(folder, DigestCache(recompute=True))


def test_a_full_check_binds_all_of_a_file(path, tmp_path):
    sampled = bind(path, None)["inputs"]
    assert sampled[NAME]["kind"] == SAMPLED
    assert "--full-check" in verify(tmp_path / "run", sampled).notes[0]
    whole = bind(path, sampled, full_check=True)["inputs"]
    assert whole[NAME]["kind"] == WHOLE and bind(path, None, full_check=True)["inputs"] == whole
    assert bind(path, whole)["inputs"] == whole and not verify(tmp_path / "run", whole).notes
    change(path, 100)  # between two samples
    assert bind(path, sampled)["inputs"] == sampled
    for policy in ({}, {"full_check": True}):
        with pytest.raises(DataError, match=r"data\.train 1\.bin"):
            bind(path, whole, **policy)
    (problem,) = verify(tmp_path / "run", whole).problems
    assert str(path) in problem


def test_a_full_check_compares_the_samples(path):
    sampled = bind(path, None)["inputs"]
    change(path, 0)
    for policy in ({}, {"full_check": True}):
        with pytest.raises(DataError, match=r"data\.train 1\.bin"):
            bind(path, sampled, **policy)
    accepted = bind(path, sampled, full_check=True, accept_changed=True)
    assert accepted["inputs"][NAME]["kind"] == WHOLE
    assert run_inputs.changes_accepted_at(accepted, 3) and not run_inputs.changes_accepted_at(accepted, 2)
