"""A run is bound to the content of what its numbers depend on: data, models, tokenizer, held-out samples, caches."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ligo.common.file_digest import seal
from megatron_ligo.config.run_config import RunConfig
from tests.tiny_models import hf_llama, llama_config
from tests.training import input_cases
from tests.training.test_pretrain import SEQ, make_pair

STEPS, STOP = 4, 2


def prepare(folder: Path) -> dict:
    """Writes data and a small model with a tokenizer; returns the settings of a fit and a pretraining run."""
    for seed, name in enumerate(("train", "valid")):
        make_pair(folder / name, seed)
    hf_llama(llama_config(tied=True, num_layers=2)).save_pretrained(folder / "small")
    (folder / "small/tokenizer.json").write_text("{}")
    table = RunConfig().to_dict()
    table["small"]["path"] = str(folder / "small")
    table["large"] |= {"num_layers": 3, "ffn_size": 40}
    table["data"] |= {"train": [str(folder / "train")], "valid": [str(folder / "valid")], "seq_length": SEQ}
    for tool in ("fit", "pretrain"):
        table[tool] |= {"steps": STEPS, "save_every": STOP, "global_batch_size": 4, "lr": 1e-3}
    table["pretrain"] |= {"start": str(folder / "small")}
    return table


@pytest.fixture(scope="module", params=["fit", "pretrain"])
def results(pools, tmp_path_factory, request) -> dict:
    folder = tmp_path_factory.mktemp(request.param)
    settings = prepare(folder)
    arguments = {"tool": request.param, "base": str(folder), "settings": settings, "stop_after": STOP}
    results = pools(1).run(input_cases.try_changes, **arguments)
    return results | {"folder": folder, "tool": request.param, "settings": settings}


def test_an_untouched_run_resumes_bit_for_bit(results):
    assert len(results["whole"]) == STEPS and isinstance(results["whole"], list)
    for name in ("untouched", "moved data", "full check", "sample order of zeros", "seconds of the metrics"):
        assert results[name] == results["whole"], name


@pytest.mark.parametrize("change", input_cases.CHANGES)
def test_a_change_is_refused_by_name(results, change):
    _, file, name = input_cases.CHANGES[change]
    text = results[change]
    assert isinstance(text, str) and text.startswith("DataError: what the run stands on has changed"), text
    path = file.rpartition("/")[0] if file.startswith("small/") and "tokenizer" not in file else file
    assert name in text and str(results["folder"] / path) in text and "--accept-changed-data" in text, text


@pytest.mark.parametrize("change", ["a digit of the metrics", "no metrics"])
def test_changed_metrics_are_refused(results, change):
    assert f"metrics.jsonl: expected {STOP} rows up to step {STOP}" in results[change], results[change]


def test_metrics_that_are_gone_with_consent_lose_no_tokens(results):
    assert results["accepted metrics"] == results["whole"][STOP:]
    assert results["tokens"] == [tokens * results["tokens"][0] // (STOP + 1) for tokens in (STOP + 1, STOP + 2)]


def test_an_accepted_change_is_recorded(results):
    assert len(results["accepted"]) == STEPS
    (accepted,) = results["record"]["accepted_changes"]
    assert accepted["step"] == STOP and accepted["user"] and accepted["time"]
    assert any("weights" in change for change in accepted["changes"])
    rows = results["accepted rows"]
    assert list(rows) == [STOP + 1] and all(change in rows[STOP + 1] for change in accepted["changes"])
    # The run goes on from there without the flag.
    assert results["accepted before"] == results["accepted"]


@pytest.mark.parametrize(("version", "outcome"), [(2, "adopted"), (3, "refused")])
def test_records_without_digests(results, pools, tmp_path, version, outcome):
    """A record of the version that had none is taken as it is; one that has lost them is refused."""
    tool, folder, output = results["tool"], results["folder"], tmp_path / "run"

    def drop_inputs(record: dict) -> None:
        del record["state"]["inputs"], record["record_digest"]
        record["version"] = version
        if version > 2:
            record.update(seal(record))

    shutil.copytree(folder / tool, output)
    input_cases.edit_record(output, drop_inputs)
    result = pools(1).run(input_cases.run, tool=tool, settings=results["settings"], output=str(output))
    if outcome == "adopted":
        assert result == results["whole"]
    else:
        assert "expected the digests of the run's inputs" in result
