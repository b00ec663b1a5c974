"""Paths that are missing: from another folder than the config's, or empty."""

from __future__ import annotations

import sys

import pytest

from megatron_ligo import cli
from megatron_ligo.checkpoint import formats
from megatron_ligo.common import hub_models
from megatron_ligo.common.errors import CheckpointError, ConfigError, DataError, ErrorCollector
from megatron_ligo.config.run_config import RunConfig
from megatron_ligo.data.indexed_dataset import open_indexed_files


def test_a_path_from_the_configs_folder_is_explained(tmp_path, monkeypatch):
    (tmp_path / "project" / "models" / "small").mkdir(parents=True)
    (tmp_path / "project" / "train.idx").touch()
    config = tmp_path / "project" / "run.toml"
    config.write_text('[small]\npath = "models/small"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_models, "config_folders", set())
    # Without the config, it may be the name of a model on the hub.
    assert "Check the path." in f"{hub_models.missing_path('models/small')}"
    small = RunConfig.load(config).small
    hint = rf"run the command in {config.parent}, or write the path in full\."
    with pytest.raises(CheckpointError, match=hint) as raised:
        formats.open_small(small)
    assert "hub" not in str(raised.value)
    errors = ErrorCollector("data", DataError)
    for prefix in ("train", f"{tmp_path / 'train'}"):
        open_indexed_files(prefix, errors)
    with pytest.raises(DataError, match=hint):
        errors.raise_if_any()
    # What is nowhere, or in full, is not explained.
    assert "Check the path." in f"{hub_models.missing_path('models/other')}"
    assert "Check the path." in f"{hub_models.missing_path('/models/small')}"


@pytest.mark.parametrize("argument", ["", "--output="])
def test_an_empty_argument_is_refused(monkeypatch, argument):
    """What an unset variable of the shell leaves: as a folder it would be the current one."""
    monkeypatch.setattr(sys, "argv", ["ligo", "--output", argument])
    with pytest.raises(ConfigError, match=f"argument '{argument}': expected a value, found an empty text"):
        cli._check_arguments()
