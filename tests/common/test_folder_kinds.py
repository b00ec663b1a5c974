"""A folder's kind: no command writes into another thing's folder; readers take the folder of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_ligo.checkpoint import formats
from megatron_ligo.checkpoint.convert import convert
from megatron_ligo.checkpoint.verify import compare
from megatron_ligo.commands.data import prepare
from megatron_ligo.common import folder_kinds
from megatron_ligo.common.errors import CheckpointError, ConfigError
from megatron_ligo.common.file_lock import LOCK_FILE, exclusive_access
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.prepare_images import prepare_images
from megatron_ligo.data.token_codes import build_codes
from megatron_ligo.export import provenance
from megatron_ligo.export.handoff import grow_from_config
from megatron_ligo.export.provenance import PRETRAIN_RECORD
from megatron_ligo.growth import operator_file
from megatron_ligo.report import write_report
from megatron_ligo.testing.fuzz import guided_fuzzing, trials
from tests.tiny_models import hf_llama, llama_config

MARKED = {
    "chain.json": folder_kinds.CHAIN,
    "results.json": folder_kinds.COMPARISON,
    "pretrain.json": folder_kinds.PRETRAINING,
    "growth.json": folder_kinds.HANDOFF,
    ".universal.partial/lock": folder_kinds.HANDOFF,
    "operator/operator.json": folder_kinds.FIT,
    "checkpoints/step_4/record.json": folder_kinds.FIT,
    "operator.json": folder_kinds.OPERATOR,
    "prepared.json": folder_kinds.DATA,
    "train.idx": folder_kinds.DATA,
    "config.json": folder_kinds.MODEL,
    "model.gguf": folder_kinds.MODEL,
    "report.html": folder_kinds.REPORT,
    "pytorch_model_fsdp_0/.metadata": folder_kinds.MODEL,
    "eval.json": folder_kinds.EVALUATION,
    "kills.json": folder_kinds.SOAK,
    "a story.txt": folder_kinds.TEXTS,
    "shard_0.jsonl.zst": folder_kinds.TEXTS,
    "train-00000-of-00001.parquet": folder_kinds.TEXTS,
}


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


def test_the_names_are_those_that_are_written():
    assert folder_kinds.HANDOFF_RECORD == provenance.RECORD_NAME
    assert folder_kinds.OPERATOR_RECORD == operator_file.RECORD
    assert PRETRAIN_RECORD in folder_kinds.PRETRAINING.marks


@pytest.mark.parametrize("name, kind", MARKED.items())
def test_a_folder_is_refused_to_all_other_kinds(tmp_path, name, kind):
    folder = tmp_path / "folder"
    folder_kinds.check_output(folder, kind)
    (folder / "unrelated").mkdir(parents=True)
    folder_kinds.check_output(folder, folder_kinds.REPORT)
    write(folder / name)
    assert folder_kinds.identify(folder) is kind
    folder_kinds.check_output(folder, kind)
    for other in set(folder_kinds.KINDS) - {kind}:
        with pytest.raises(ConfigError, match=f"--output .*: expected a new folder, or one of {other}, found {kind}"):
            folder_kinds.check_output(folder, other)


@pytest.mark.parametrize("name", ["results.json", "metrics.jsonl", "report.html", "chain.json"])
def test_a_model_with_other_files_is_a_model(tmp_path, name):
    for each in (name, "config.json", "model.safetensors"):
        write(tmp_path / each)
    assert folder_kinds.identify(tmp_path) is folder_kinds.MODEL
    assert folder_kinds.find_model_part(tmp_path) == tmp_path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds") / "small"
    hf_llama(llama_config()).save_pretrained(folder)
    return folder


def growth(small: Path) -> RunConfig:
    return RunConfig.load(None, [f"small.path={small}", "large.num_layers=4"])


def test_no_command_writes_into_the_small_models_folder(small):
    before = sorted(path.name for path in small.iterdir())
    for work in (
        lambda: grow_from_config(growth(small), None, small),
        lambda: prepare_images(None, None, small, 0.1),
        lambda: write_report([small], small),
    ):
        with pytest.raises(ConfigError, match=r"found a model\. It stays as it is"):
            work()
    assert sorted(path.name for path in small.iterdir()) == before


def test_a_file_is_no_output(tmp_path):
    write(tmp_path / "file")
    with pytest.raises(ConfigError, match="expected a folder, or a free path for one, found a file"):
        folder_kinds.check_output(tmp_path / "file", folder_kinds.FIT)


@pytest.mark.parametrize("name", ["prepared.json", "codes.json", "a.txt", "report.html"])
def test_a_folder_that_is_no_model_is_named(tmp_path, name):
    write(tmp_path / name)
    kind = folder_kinds.identify(tmp_path)
    with pytest.raises(CheckpointError, match=f"expected a checkpoint, found {kind}. Give the folder"):
        formats.open(tmp_path)


def test_notes_and_logs_are_no_texts(tmp_path):
    for name in ("log.txt", "stdout.txt", "slurm-7.out", "requirements.txt", "README.txt", "Notes.txt", "run.sh"):
        write(tmp_path / name)
    assert folder_kinds.identify(tmp_path) is None


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    write(folder / "a.txt")
    return folder


def test_no_command_writes_between_texts(small, corpus):
    config = growth(small)
    for work in (
        lambda: build_codes(config, None, corpus, None, 0),
        lambda: grow_from_config(config, None, corpus),
        lambda: prepare_images(None, None, corpus, 0.1),
        lambda: write_report([small], corpus),
    ):
        with pytest.raises(ConfigError, match=r"found texts\. It stays as it is"):
            work()
    assert [path.name for path in corpus.iterdir()] == ["a.txt"]


def test_a_soak_test_removes_nothing_of_a_users(corpus):
    write(corpus / "work" / "thesis.tex")
    with pytest.raises(ConfigError, match=r"expected a new folder, found one with a\.txt, work"):
        trials.run_fuzz(corpus, 1, 0, print, [])
    with pytest.raises(ConfigError, match=r"expected a new folder, found one with a\.txt, work"):
        guided_fuzzing.run_guided_fuzz(corpus, 0, 0, print, samples=[])
    assert (corpus / "work" / "thesis.tex").is_file()


def test_texts_are_not_prepared_into_their_own_folder(corpus, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    args = prepare.build_parser().parse_args(["corpus", "--tokenizer", "t", "--output", f"{corpus}/."])
    with pytest.raises(ConfigError, match="expected another folder than that of the texts, found the same"):
        prepare.run(args)


def test_a_lock_that_is_no_file_blocks_nothing(tmp_path):
    os.mkfifo(tmp_path / LOCK_FILE)
    with pytest.raises(ConfigError, match="expected a lock file, or nothing"), exclusive_access(tmp_path):
        pass


def test_readers_pick_the_part(small, tmp_path):
    grown = tmp_path / "grown"
    grow_from_config(growth(small), None, grown)
    assert formats.open(grown).path == grown / "universal"
    assert compare(formats.open(grown), formats.open(grown / "hf")).same
    run = tmp_path / "run"
    write(run / "pretrain.json")
    with pytest.raises(CheckpointError, match="found a pretraining without a checkpoint"):
        formats.open(run)
    for step in (9, 10):
        convert(formats.open(small), run / f"checkpoints/step_{step}", "hf")
        write(run / f"checkpoints/step_{step}/record.json")
    write(run / "checkpoints/step_11.damaged/record.json")
    assert formats.open(run).path == run / "checkpoints/step_10"
    write(tmp_path / "fit/operator/operator.json")
    assert folder_kinds.find_operator_part(tmp_path / "fit") == tmp_path / "fit/operator"
    for folder in (tmp_path / "fit", tmp_path / "fit/operator"):
        with pytest.raises(CheckpointError, match=r"Grow the model first: ligo grow --operator .*fit/operator"):
            formats.open(folder)
