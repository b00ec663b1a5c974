"""The chain small model -> operator -> hand-off -> checkpoints: one changed byte anywhere in it is noticed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.common.errors import CheckpointError, LigoError
from megatron_ligo.common.file_digest import seal
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.distributed.digest_cache import DigestCache
from megatron_ligo.export import chain, handoff, provenance, run_inputs
from megatron_ligo.export.run_inputs import InputPolicy
from tests.tiny_models import hf_llama, llama_config
from tests.training import input_cases
from tests.training.test_run_inputs import prepare


@pytest.fixture(scope="module")
def place(pools, tmp_path_factory) -> Path:
    """Data, a small model, and runs/ with a fit, the model that it grew, and its training."""
    folder = tmp_path_factory.mktemp("chain")
    settings = prepare(folder)
    assert isinstance(
        pools(1).run(input_cases.run, tool="fit", settings=settings, output=str(folder / "runs/fit")), list
    )
    handoff.grow_from_config(RunConfig.from_dict(settings), folder / "runs/fit/operator", folder / "runs/grown")
    settings["pretrain"]["start"] = str(folder / "runs/grown")
    output = str(folder / "runs/pretrain")
    assert isinstance(pools(1).run(input_cases.run, tool="pretrain", settings=settings, output=output), list)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def read_settings(place: Path) -> dict:
    return json.loads((place / "settings.json").read_text())


def problems(folder: Path, recompute: bool = False) -> str:
    return "\n".join(chain.verify_runs(folder, DigestCache(recompute=recompute)).problems)


@contextmanager
def restored(path: Path) -> Iterator[bytes]:
    """Yields a file's content, and brings it and its times back."""
    content, status = path.read_bytes(), path.stat()
    try:
        yield content
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("run", [".", "fit", "grown", "pretrain", "pretrain/checkpoints/step_4"])
def test_an_untouched_chain(place, run):
    report = chain.verify_runs(place / "runs" / run, DigestCache(recompute=run == "."))
    assert report.checked and not report.problems and not report.notes
    if run == ".":
        assert f"{place / 'runs/grown'}: grown by an operator beside it" in report.checked


@pytest.mark.parametrize("name", ["fit/operator/operator.json", "grown/growth.json"])
def test_a_record_that_is_gone_is_noticed(place, name):
    path = place / "runs" / name
    aside = path.rename(place / "aside")
    try:
        for folder in (place / "runs", place / "runs" / name.partition("/")[0]):
            assert f"{path.parent}: expected its {path.name}, found none." in problems(folder)
    finally:
        aside.rename(path)


CHANGED = {
    "small/model.safetensors": "small model: weights",
    "small/tokenizer.json": "tokenizer: tokenizer.json",
    "train.bin": "data.train 1.bin",
    "valid.idx": "data.valid 1.idx",
    "runs/fit/operator/operator.safetensors": "operator.safetensors",
    "runs/fit/operator/operator.json": "operator.json",
    "runs/fit/checkpoints/step_4/record.json": "record.json",
    "runs/grown/growth.json": "growth.json",
    "runs/grown/hf/config.json": "hf/config.json",
    "runs/grown/hf/model.safetensors": "hf/model.safetensors",
    "runs/grown/hf/tokenizer.json": "hf/tokenizer.json",
    "runs/grown/universal/dims.json": "universal/dims.json",
    "runs/grown/universal/manifest.json": "universal/manifest.json",
    "runs/grown/universal/global_step0/zero/*final*/fp32.pt": "fp32.pt",
    "runs/grown/universal/global_step0/zero/*final*/exp_avg.pt": "exp_avg.pt",
    "runs/pretrain/pretrain.json": "pretrain.json",
    "runs/pretrain/model/dims.json": "model/dims.json",
    "runs/pretrain/checkpoints/step_4/state/*optim*.pt": "optim_states.pt",
    "runs/pretrain/data_cache/*/*shuffle_index.npy": "sample order",
}  # fmt: skip


@pytest.mark.parametrize("pattern", [name for name in CHANGED if not name.startswith("runs/pretrain")])
def test_the_chain_is_walked_from_its_end(place, pattern):
    """Also if the folder that is given holds the last run alone."""
    (path,) = place.glob(pattern)
    with restored(path) as content:
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert CHANGED[pattern] in problems(place / "runs/pretrain")


def test_a_checkpoint_without_its_record_is_noticed(place):
    path = max(place.glob("runs/pretrain/checkpoints/step_*/record.json"))
    aside = path.rename(place / "aside")
    try:
        assert f"{path.parent}: expected its record.json, found none." in problems(place / "runs")
    finally:
        aside.rename(path)


@pytest.mark.parametrize("pattern", CHANGED)
def test_one_changed_byte_is_noticed(place, pattern):
    path = next(place.glob(pattern))
    with restored(path) as content:
        for at in (len(content) // 3, len(content) - 2):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            assert CHANGED[pattern] in problems(place / "runs"), at
    assert not problems(place / "runs")


def test_a_changed_loss_is_noticed(place):
    """By `verify`, and where a finished stage is used again."""
    run = place / "runs/pretrain"
    with restored(run / "metrics.jsonl") as content:
        (run / "metrics.jsonl").write_bytes(content.replace(b'"loss": ', b'"loss": 1', 1))
        for listed in (problems(place / "runs"), "\n".join(chain.find_changed_inputs(run, DigestCache()))):
            assert "metrics.jsonl: expected 4 rows up to step 4" in listed
    assert not chain.find_changed_inputs(run, DigestCache())


@pytest.mark.parametrize(
    "pattern", ["runs/grown/universal/dims.json", "runs/grown/universal/global_step0/zero/*final*/fp32.pt"]
)
def test_pretraining_does_not_begin_from_a_damaged_hand_off(place, pools, tmp_path, pattern):
    path, settings = next(place.glob(pattern)), read_settings(place)
    with restored(path) as content:
        if path.suffix == ".json":
            record = json.loads(content)
            path.write_text(json.dumps({**record, "dims": {**record["dims"], "norm_eps": 0.5}}))
        else:
            # A whole file with other numbers: a damaged one would not be read at all.
            state = torch.load(path, weights_only=True)
            torch.save({name: -tensor for name, tensor in state.items()}, path)
        shutil.copytree(place / "runs/pretrain", tmp_path / "stopped")
        shutil.rmtree(tmp_path / "stopped/checkpoints/step_4")
        for output in ("new", "stopped"):
            text = pools(1).run(input_cases.run, tool="pretrain", settings=settings, output=str(tmp_path / output))
            assert isinstance(text, str) and str(path) in text and "has changed since" in text, text
        accept = InputPolicy(accept_changed=True)
        if path.suffix == ".pt":
            arguments = {"settings": settings, "output": str(tmp_path / "accepted"), "policy": accept}
            assert isinstance(pools(1).run(input_cases.run, tool="pretrain", **arguments), list)
            (accepted,) = json.loads((tmp_path / "accepted/pretrain.json").read_text())["accepted_changes"]
            assert accepted["step"] == 0 and str(path) in accepted["changes"][0]
        with pytest.raises(CheckpointError, match="has changed since it was written"):
            handoff.grow_from_config(RunConfig.from_dict(settings), place / "runs/fit/operator", place / "runs/grown")


@pytest.mark.parametrize(("name", "expected"), [("model.safetensors", "weights"), ("config.json", "sizes")])
def test_an_unfitted_hand_off_names_its_small_model(tmp_path, name, expected):
    hf_llama(llama_config(tied=True, num_layers=2)).save_pretrained(tmp_path / "small")
    config = RunConfig.load(None, [f"small.path={tmp_path / 'small'}", "large.num_layers=3"])
    record = handoff.grow_from_config(config, None, tmp_path / "grown")
    assert not problems(tmp_path / "grown")
    path = tmp_path / "small" / name
    with restored(path) as content:
        altered = {"model.safetensors": content[:-1] + b"~", "config.json": content.replace(b'_eps": ', b'_eps": 2')}
        path.write_bytes(altered[name])
        assert f"({run_inputs.SMALL_MODEL}: {expected})" in problems(tmp_path / "grown")
    # Grown again, the hand-off of an earlier version names it too.
    provenance.write(tmp_path / "grown", {key: value for key, value in record.items() if key != run_inputs.INPUTS})
    assert handoff.grow_from_config(config, None, tmp_path / "grown") == record


def test_another_operator_beside_the_hand_off(place):
    record = provenance.read(place / "runs/grown")
    path = place / "runs/grown/growth.json"
    with restored(path):
        path.write_text(json.dumps(seal({**record, "operator": {**record["operator"], "record_digest": "0" * 32}})))
        assert "by which" in problems(place / "runs") and "operator" in problems(place / "runs")


def grow(place: Path, output: Path, accept: bool = False, **changes: dict) -> dict:
    table = read_settings(place)
    for section, values in changes.items():
        table[section] |= values
    config = RunConfig.from_dict(table)
    return handoff.grow_from_config(config, place / "runs/fit/operator", output, accept_changed=accept)


def test_an_operator_is_bound_to_the_weights_that_it_was_fitted_on(place, tmp_path):
    other = hf_llama(llama_config(tied=True, num_layers=2), seed=9)
    other.save_pretrained(tmp_path / "other")
    small = {"path": str(tmp_path / "other")}
    with pytest.raises(CheckpointError) as error:
        grow(place, tmp_path / "out", small=small)
    assert str(tmp_path / "other") in str(error.value) and "fitted on" in str(error.value)
    assert not (tmp_path / "out").exists()
    record = grow(place, tmp_path / "out", accept=True, small=small)
    assert len(record["accepted_changes"]) == 1 and str(tmp_path / "other") in record["accepted_changes"][0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"large": {"num_layers": 9}}, ["large.num_layers"]),
        ({"large": {"num_layers": 9, "hidden_size": 48}}, ["large.num_layers", "large.hidden_size"]),
        ({"operator": {"method": "noisy_stack"}}, ["operator.method"]),
    ],
)
def test_a_config_that_asks_for_another_operator(place, tmp_path, changes, named):
    with pytest.raises(LigoError) as error:
        grow(place, tmp_path / "out", **changes)
    assert all(name in str(error.value) for name in named) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"tied": False}, {"norm_eps": 5.0}, {"rope_base": 77.0}])
def test_an_altered_operator_record(place, tmp_path, change):
    path = place / "runs/fit/operator/operator.json"
    record = json.loads(path.read_bytes())
    record["large"] |= change
    with restored(path):
        path.write_text(json.dumps(record))
        with pytest.raises(CheckpointError, match="its own digest"):
            grow(place, tmp_path / "out")


def test_the_small_model_is_opened_as_the_run_did(tmp_path):
    """It states a key that was accepted, and has files of two formats."""
    small = tmp_path / "small"
    hf_llama(llama_config(tied=True, num_layers=2)).save_pretrained(small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "our_note": 3}))
    convert(formats.open(small, "hf", ["our_note"]), tmp_path / "other", "universal")
    shutil.copytree(tmp_path / "other", small, dirs_exist_ok=True)
    sets = [f"small.path={small}", "small.format=hf", 'small.accept=["our_note"]', "large.num_layers=3"]
    record = handoff.grow_from_config(RunConfig.load(None, sets), None, tmp_path / "grown")
    assert {entry["accept"][0] for entry in record[run_inputs.INPUTS].values()} == {"our_note"}
    assert not problems(tmp_path / "grown")


@pytest.mark.parametrize("entry", [None, {}, {"path": 5}, {"kind": "other"}, {"digest": None}, {"accept": "name"}])
def test_an_entry_that_this_program_did_not_write(place, entry):
    path = place / "runs/pretrain/pretrain.json"
    record = json.loads(path.read_text())
    name, stated = next(iter(record[run_inputs.INPUTS].items()))
    with restored(path):
        other = {**stated, **entry} if entry else entry
        path.write_text(json.dumps(seal({**record, run_inputs.INPUTS: {name: other}})))
        assert f"{path}: inputs {name}: expected an input's path, digest, and kind" in problems(place / "runs/pretrain")


@pytest.mark.parametrize("mistake", [KeyError, TypeError, AttributeError])
def test_a_mistake_of_ours_is_no_foreign_record(place, monkeypatch, mistake):
    def fail(*_):
        raise mistake("ours")

    monkeypatch.setattr(chain, "hash_json", fail)
    with pytest.raises(mistake, match="ours"):
        chain.verify_runs(place / "runs", DigestCache())
