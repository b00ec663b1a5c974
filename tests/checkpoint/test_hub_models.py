"""Models by their names on the Hugging Face hub: its cache in its own layout, and words where there is no network."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest

import megatron_ligo as ligo
from megatron_ligo.common import hub_models
from tests.checkpoint import hf_models

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Path:
    """A cache that has org/tiny, as huggingface_hub lays it out, without a network; returns the snapshot."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    hf_models.saved(tmp_path / "saved")
    for number, path in enumerate(sorted((tmp_path / "saved").iterdir())):
        path.rename(repository / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_a_name_is_read_from_the_cache(cached, tmp_path):
    assert ligo.verify("org/tiny", hf_models.model()).same
    assert Path(ligo.inspect("org/tiny")["path"]) == cached
    assert ligo.grow("org/tiny", num_layers=3).config.num_hidden_layers == 3
    assert "pretraining" in str(ligo.plan("org/tiny", num_layers=3, settings={"data.seq_length": 8}))
    # A folder of that name comes first.
    hf_models.saved(tmp_path / "org" / "tiny", tied=True)
    assert ligo.inspect("org/tiny")["path"] == "org/tiny"


def test_a_name_that_is_nowhere_is_refused_in_one_sentence(cached, tmp_path):
    with pytest.raises(ligo.CheckpointError) as refusal:
        ligo.inspect("org/huge")
    # The path first, and the folder in which it was looked for; then the hub, and why it was not asked.
    missing = f"org/huge: expected a checkpoint, found nothing there (in {tmp_path}). Check the path."
    assert f"{refusal.value}".startswith(f"{missing} As the name of a model on the Hugging Face hub: it is not in ")
    assert "HF_HUB_OFFLINE forbids the network." in f"{refusal.value}"
    (tmp_path / "models").mkdir()
    for path in ("models/small", "./org/tiny", "a/b/c", "nowhere"):
        with pytest.raises(ligo.CheckpointError) as refusal:
            ligo.inspect(path)
        assert f"{refusal.value}".endswith(f"found nothing there (in {tmp_path}). Check the path.")


def test_a_push_goes_to_a_private_model(tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name: str, **options: object) -> str:
            calls.append((name, options))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, **options: object) -> None:
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert hub_models.push_model(tmp_path, "org/large") == "https://huggingface.co/org/large"
    assert calls[0] == ("org/large", {"private": True, "exist_ok": True})
    assert calls[1]["folder_path"] == tmp_path and calls[1]["repo_id"] == "org/large"
    with pytest.raises(ligo.CheckpointError, match="ORG/NAME"):
        hub_models.check_push("large")


def test_a_push_without_a_network_says_how_to_repeat_it(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ligo.MachineError, match=r"found HF_HUB_OFFLINE forbids .*hf upload org/large"):
        hub_models.push_model(tmp_path, "org/large")
