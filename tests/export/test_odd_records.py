"""A record whose digests hold but whose values are odd is refused by name, not by a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ligo.arch.model_config import ModelConfig
from megatron_ligo.checkpoint import manifest, run_record
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.common.file_digest import SEAL, seal
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export import chain, handoff, run_inputs
from tests.tiny_models import hf_llama, llama_config


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    hf_llama(llama_config(tied=True, num_layers=2)).save_pretrained(folder / "small")
    sets = [f"small.path={folder / 'small'}", "large.num_layers=3", "handoff.formats=['hf']"]
    handoff.grow_from_config(RunConfig.load(None, sets), None, folder / "grown")
    return folder / "grown"


def edit(path: Path, keys: tuple[str, ...], value: object) -> None:
    """Writes a record with one other value, under a digest that holds."""
    record = json.loads(path.read_text())
    table = record
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = value
    path.write_text(json.dumps(seal({key: entry for key, entry in record.items() if key != SEAL})))


@pytest.mark.parametrize("keys", [("files",), ("digests",), ("tensors",)], ids=lambda keys: keys[0])
def test_a_manifest_without_a_table(grown, keys):
    path = grown / "hf" / manifest.MANIFEST
    content = path.read_bytes()
    try:
        edit(path, keys, None)
        with pytest.raises(CheckpointError, match="a manifest that this program wrote"):
            manifest.load_manifest(path.parent)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("keys", [("files", "a.pt", "size"), ("layout", "tp")], ids=lambda keys: keys[-1])
def test_an_infinite_number_in_the_record_of_a_checkpoint(tmp_path, keys):
    (tmp_path / "a.pt").write_bytes(b"x")
    layout = {"tp": 1, "pp": 1, "dp": 1, "zero": 1}
    files = {"a.pt": run_record.describe_file(tmp_path / "a.pt")}
    run_record.write_run_record(tmp_path, {"step": 1, "state": {}, "files": files, "layout": layout})
    run_record.read_run_record(tmp_path / run_record.RECORD)
    edit(tmp_path / run_record.RECORD, keys, float("inf"))
    with pytest.raises(CheckpointError, match="the record of a checkpoint"):
        run_record.read_run_record(tmp_path / run_record.RECORD)


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b"], ids=["long", "NUL"])
def test_an_input_whose_name_no_file_can_have(grown, name):
    edit(grown / "growth.json", (run_inputs.INPUTS, f"{run_inputs.SMALL_MODEL}: weights", "path"), name)
    report = chain.verify_runs(grown, DigestCache())
    assert any("is not there: not compared" in note for note in report.notes)


@pytest.mark.parametrize("sizes", [None, [[]], "x", 3], ids=str)
def test_sizes_that_are_no_table(sizes):
    with pytest.raises(ConfigError, match="a table"):
        ModelConfig.from_json(sizes)
